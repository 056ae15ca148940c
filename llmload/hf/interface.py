"""All that differs between the lines of transformers that are supported, as one interface.

Each line is a package beside this module that has these functions: ``v5`` and ``v4_51``. Nothing
outside ``llmload.hf`` asks for a version of transformers; it asks the installed line, which
:func:`llmload.hf.installed_transformers` chooses.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

    from llmload.checkpoint.accounting import Accounting
    from llmload.checkpoint.contents import Checkpoint
    from llmload.checkpoint.mapped import MappedCheckpoint
    from llmload.checkpoint.placement import Placement
    from llmload.checkpoint.proof import Proof

    DeviceMap: TypeAlias = dict[str, int | str | torch.device]
    """Module name -> device, nothing left to be resolved."""


class Transformers(Protocol):
    """What transformers does one way in one line of versions and another way in another."""

    # --- configs ----------------------------------------------------------------------------------

    def dtype_option(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Return the keyword by which ``from_pretrained`` and ``from_config`` take a dtype."""
        ...

    def config_dtype(self, config: PretrainedConfig) -> torch.dtype | None:
        """Return the dtype that a config declares."""
        ...

    def config_for(
        self, model_class: type[PreTrainedModel], config: PretrainedConfig
    ) -> PretrainedConfig:
        """Return the config from which an ``Auto`` class would build the class that it found."""
        ...

    def validate_to_save(self, config: GenerationConfig) -> None:
        """Hold a generation config to what ``save_pretrained`` asks of it.

        :raises ValueError: or a warning that becomes an error there, where it would not be saved.
        """
        ...

    # --- models without storage -------------------------------------------------------------------
    # ``asked`` is whether the dtype was asked for: with ``auto`` the parts of a composite model may
    # keep what their configs declare.

    def blank(
        self,
        model_class: type[PreTrainedModel],
        config: PretrainedConfig,
        dtype: torch.dtype,
        *,
        stored: Container[str] = (),
        asked: bool = True,
    ) -> PreTrainedModel:
        """Build a model on the meta device, as ``from_pretrained`` does before it reads.

        From a copy of ``config``. Weights are tied by the constructor at most. A line may leave
        buffers with their values.

        :param stored: names of the checkpoint's tensors.
        :raises Exception: whatever the class raises for its config.
        """
        ...

    def to_fill(self, blank: PreTrainedModel) -> PreTrainedModel:
        """Make a blank model ready for :meth:`fill`; it belongs to the caller."""
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

    def construct(
        self,
        model_class: type[PreTrainedModel],
        config: PretrainedConfig,
        dtype: torch.dtype,
        *,
        asked: bool = True,
    ) -> PreTrainedModel:
        """Build a model as its constructor makes it on the CPU, from a copy of ``config``."""
        ...

    def gives_memory(self) -> str:
        """Name the method of a model that gives memory to what a checkpoint lacks."""
        ...

    def give_own_kind(self, model: PreTrainedModel, missing: Sequence[str]) -> None:
        """Give memory to missing tensors that are not of floating point, where transformers would
        give them that of floats."""
        ...

    def unloaded(self, model: PreTrainedModel, given: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Return the tensors that have no final values yet though they are not on the meta device.

        A line gives memory first to what transformers has left there against its own rules.

        :param given: positional arguments of the model's ``_initialize_missing_keys``.
        """
        ...

    def computed(self, model: PreTrainedModel) -> list[torch.Tensor]:
        """Return what the constructors of transformers' own modules have computed in a new model,
        where they ran on the CPU."""
        ...

    def no_init_weights(self) -> AbstractContextManager[Any]:
        """Return a context in which new modules keep uninitialised memory."""
        ...

    def is_post_initialised(self, model: PreTrainedModel) -> bool:
        """Say whether the constructor did at its end what loading needs: ``self.post_init()``."""
        ...

    def adapters_left_alone(self) -> AbstractContextManager[None]:
        """Return a context in which ``from_pretrained`` loads no adapter that lies beside the
        weights. It looks for one in any folder that it is given, and has no option not to."""
        ...

    def tied_names(self, model: PreTrainedModel) -> set[str]:
        """Return the parameters that the config ties to another one, which keeps its own name."""
        ...

    def ties(self, model: PreTrainedModel) -> dict[str, str]:
        """Return those of :meth:`tied_names` with the name of what each is tied to."""
        ...

    def leaves_small_floats(self) -> bool:
        """Say whether floats of 8 bits stay so in a model of another dtype."""
        ...

    def keeps_apart(self) -> bool:
        """Say whether weights that are to be tied stay apart where they are stored differently."""
        ...

    def trains_once_loaded(self, like: torch.Tensor) -> bool:
        """Say whether a parameter requires gradients when it is loaded in place of ``like``."""
        ...

    # --- streaming --------------------------------------------------------------------------------

    def unsuited(self) -> str | None:
        """Name the first private function of transformers that is not as expected, or None.

        Where there is one, nothing else of this part may be called but :meth:`finish`.
        """
        ...

    def account(
        self, model: PreTrainedModel, checkpoint: Checkpoint, *, tied: bool = False
    ) -> Accounting:
        """Say how the checkpoint's keys fit a model without storage, which is left as it is.

        :param tied: whether the model is tied already, as :meth:`to_fill` leaves it.
        """
        ...

    def kept_in_float32(self, model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
        """Return the names of the parameters that stay float32 in a model of that dtype."""
        ...

    def final_dtypes(
        self, model: PreTrainedModel, accounting: Accounting, dtype: torch.dtype
    ) -> dict[str, torch.dtype]:
        """Return the dtype that each parameter and buffer will have, by name."""
        ...

    def resolve_device_map(
        self,
        model: PreTrainedModel,
        requested: Any,
        max_memory: Mapping[int | str, int | str] | None = None,
        *,
        tied: bool = True,
    ) -> DeviceMap | None:
        """Return modules' devices, ``auto`` and the like resolved; None for the CPU alone.

        :param max_memory: bytes that each may get, in place of what is free.
        :param tied: whether the model is tied already, as :meth:`to_fill` leaves it.
        """
        ...

    def fill(
        self,
        model: PreTrainedModel,
        files: MappedCheckpoint,
        placement: Placement,
        proof: Proof,
        accounting: Accounting,
        *,
        dtype: torch.dtype,
        device_map: DeviceMap | None,
        name_or_path: str,
    ) -> list[str]:
        """Place every weight the checkpoint has, initialise the others, tie what is tied.

        :param model: as :meth:`to_fill` or :meth:`built_under` gives it.
        :returns: the names that were initialised.
        :raises Exception: what reading or the placement raises, as it is.
        """
        ...

    def finish(
        self,
        model: PreTrainedModel,
        folder: Path,
        device_map: DeviceMap | None,
        *,
        trust_remote_code: bool,
    ) -> PreTrainedModel:
        """Do what ``from_pretrained`` does last: eval mode, generation config, device hooks."""
        ...

    # --- gradient checkpointing -------------------------------------------------------------------

    def checkpoints_gradients(self, model_class: type[PreTrainedModel]) -> bool:
        """Say whether a class can checkpoint gradients."""
        ...

    def checkpoints_selectively(self) -> bool:
        """Say whether every n-th layer can be checkpointed, and activations kept on the host."""
        ...

    def enable_checkpointing(
        self, model: PreTrainedModel, options: dict[str, Any], *, every_n_layers: int, offload: bool
    ) -> None:
        """Turn on gradient checkpointing.

        :param options: keyword arguments for ``torch.utils.checkpoint``.
        :param every_n_layers: 1 unless :meth:`checkpoints_selectively`, as ``offload`` False.
        """
        ...

    def require_input_gradients(self, model: PreTrainedModel) -> None:
        """Make the embedded tokens require gradients though nothing in the embedding does.

        ``disable_input_require_grads`` undoes it all.
        """
        ...

    # --- quantisation -----------------------------------------------------------------------------

    def quantises_weight_by_weight(self) -> bool:
        """Say whether bitsandbytes is given one weight after the other, on a CPU too."""
        ...

    def prepare_quantised(
        self, quantiser: Any, model: PreTrainedModel, dtype: torch.dtype, device_map: Any
    ) -> None:
        """Have a quantiser of transformers change a model as it does before weights are read.

        :param quantiser: whose ``validate_environment`` was called.
        :param model: without storage; it is changed.
        """
        ...

    def modules_left_unquantised(self, model: PreTrainedModel) -> list[str]:
        """Return the modules that are not quantised where no list says which: the output head,
        what is tied, the last one."""
        ...

    def leaves_unquantised(self, pattern: str, module: str) -> bool:
        """Say whether ``pattern`` among ``llm_int8_skip_modules`` keeps a linear layer as it is."""
        ...
