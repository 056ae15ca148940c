"""What a load context asks of the library that builds models: who makes one hands it in."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from llmload.checkpoint import Checkpoint
    from llmload.checkpoint.accounting import Accounting
    from llmload.spec.loadspec import LoadSpec


class Engine(Protocol):
    """Builds models without storage, and says how a checkpoint's keys fit them.

    ``asked`` is whether the dtype was asked for: with ``auto`` the parts of a composite model may
    keep what their configs declare.
    """

    def blank(
        self,
        model_class: type[PreTrainedModel],
        config: PretrainedConfig,
        dtype: torch.dtype,
        *,
        stored: Collection[str],
        asked: bool,
    ) -> PreTrainedModel:
        """Build a model from a copy of ``config``, on the meta device, weights not tied.

        :param stored: names of the checkpoint's tensors.
        :raises CheckpointError: the class refuses the config.
        """
        ...

    def to_fill(self, blank: PreTrainedModel) -> PreTrainedModel:
        """Make a blank model ready to be filled; it belongs to the caller."""
        ...

    def built_under(
        self,
        context: AbstractContextManager[Any],
        model_class: type[PreTrainedModel],
        config: PretrainedConfig,
        dtype: torch.dtype,
        *,
        asked: bool,
    ) -> PreTrainedModel:
        """Build a model to fill under a plugin's context, which keeps it without memory."""
        ...

    def account(self, model: PreTrainedModel, checkpoint: Checkpoint, *, tied: bool) -> Accounting:
        """Say how the checkpoint's keys fit a model, which is left as it is.

        :param tied: whether the model is tied already, as :meth:`to_fill` leaves it.
        """
        ...

    def dequantises(
        self,
        blank: PreTrainedModel,
        config: PretrainedConfig,
        spec: LoadSpec,
        dtype: torch.dtype,
    ) -> bool:
        """Whether a folder is quantised and transformers makes plain numbers of it here."""
        ...
