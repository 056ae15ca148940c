"""What a load context asks of transformers: models without storage, held to what is stored."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from llmload.errors import CheckpointError, in_one_line
from llmload.hf import bounds, deepspeed, quantised, token_ids

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from llmload.checkpoint.accounting import Accounting
    from llmload.checkpoint.contents import Checkpoint
    from llmload.hf.interface import Transformers
    from llmload.spec.loadspec import LoadSpec


class Engine:
    """The installed transformers as ``llmload.context.engine.Engine`` wants it."""

    def __init__(self, transformers: Transformers) -> None:
        self._transformers = transformers

    def blank(
        self,
        model_class: type[PreTrainedModel],
        config: PretrainedConfig,
        dtype: torch.dtype,
        *,
        stored: Collection[str],
        asked: bool,
    ) -> PreTrainedModel:
        """Build the model on the meta device, weights not tied.

        :raises CheckpointError: the class refuses the config, for example an attention
            implementation it does not have; the config asks for far more than is stored; or the
            class does not finish its construction as transformers needs it.
        """
        from llmload.model.reachable import Surroundings  # needs torch

        build = self._transformers.blank
        around = Surroundings(model_class)
        try:
            with bounds.while_building(len(stored)), deepspeed.hidden():
                blank = build(model_class, config, dtype, stored=stored, asked=asked)
            bounds.hold_built(blank, len(stored))
        except Exception as error:
            raise CheckpointError(
                f"{model_class.__name__} cannot be built from the config:"
                f" {in_one_line(error).rstrip('.')}",
                fix=_way_out(config, error),
                where="model",
            ) from error
        finally:
            around.put_back_what_has_no_values()
        if not self._transformers.is_post_initialised(blank):
            raise CheckpointError(
                f"the constructor of {model_class.__name__} does not call"
                " `self.post_init()`, without which transformers cannot load into it",
                fix="Call it at the end of `__init__`.",
                where="auto_class",
            )
        return blank

    def to_fill(self, blank: PreTrainedModel) -> PreTrainedModel:
        """Make a blank model ready to be filled."""
        return self._transformers.to_fill(blank)

    def built_under(
        self,
        context: AbstractContextManager[Any],
        model_class: type[PreTrainedModel],
        config: PretrainedConfig,
        dtype: torch.dtype,
        *,
        asked: bool,
    ) -> PreTrainedModel:
        """Build the model to fill under a plugin's context."""
        return self._transformers.built_under(context, model_class, config, dtype, asked=asked)

    def account(self, model: PreTrainedModel, checkpoint: Checkpoint, *, tied: bool) -> Accounting:
        """Say how the checkpoint's keys fit a model."""
        return self._transformers.account(model, checkpoint, tied=tied)

    def dequantises(
        self,
        blank: PreTrainedModel,
        config: PretrainedConfig,
        spec: LoadSpec,
        dtype: torch.dtype,
    ) -> bool:
        """Have the quantiser, if there is one, say what it would do."""
        if quantised.declared(config) is None:
            return False
        found = quantised.examine(blank, config, spec, dtype)
        return isinstance(found, quantised.Stored) and found.dequantised


def _way_out(config: PretrainedConfig, error: Exception) -> str:
    padding = token_ids.as_padding(config) if "padding_idx" in str(error).lower() else None
    if padding is not None:
        return f"Write `{padding}`, or the id of the padding: there is no row for the config's."
    return "Check the config, `auto_class` and `attn_implementation`."
