"""A model seen without its adapter, or with a frozen copy of it: a policy's reference.

The adapter is PEFT's, or a plugin says how it is turned off (``ctx.adapter_switch``); only PEFT's
are copied. Imported by functions only: this module needs torch and peft. Written against the layers
of peft 0.13 to 0.21, whose two attributes for the active adapters and for none are set here
directly: PEFT's own ``disable_adapter`` and ``set_adapter`` also change which parameters require
gradients, and leave them so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from llmload.errors import LoadFailedError
from llmload.model import partitions
from llmload.model.partitions import is_partitioned

if TYPE_CHECKING:
    from llmload.context.switch import AdapterSwitch


class AdapterView(nn.Module):
    """The model of another member with its adapter off, or with a frozen copy of the adapter.

    Call it, or its ``generate``, as that model. It computes in eval mode and without gradients,
    and whatever it switches is as it was when the call is over: the train mode of every module,
    active adapters, ``requires_grad``. So it can be called at any time of a training step, but not
    in two threads at once, nor while adapters are merged into the weights.

    The model is no submodule of it: it has no parameters and no state dict, and ``to`` or ``train``
    do not reach the model. A wrapper that shards the model outside itself, such as FSDP, is passed
    by; use the trainer's own switch there.
    """

    def __init__(
        self, model: Any, adapter: str | None = None, switch: AdapterSwitch | None = None
    ) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, nn.Module does not take it for a submodule
        self._switch = (switch,)
        self.adapter = adapter
        """The adapter that is active in a call; None for none."""
        self.training = False

    @property
    def model(self) -> Any:
        """The other member's model."""
        return self._model[0]

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """The model's generation config."""
        return self.model.generation_config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of the base model."""
        return _base_of(self.model).dtype  # type: ignore[no-any-return]

    @property
    def base_model(self) -> nn.Module:
        """The model without its head, seen the same way: trainers that compute the head's part of a
        loss themselves (TRL since 1.10) call it."""
        return _Backbone(self)

    def get_input_embeddings(self) -> nn.Module:
        """Return the model's input embedding."""
        return self.model.get_input_embeddings()  # type: ignore[no-any-return]

    def get_output_embeddings(self) -> nn.Module:
        """Return the model's head."""
        return self.model.get_output_embeddings()  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> AdapterView:
        """Stay in eval mode."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        with self.switched() as model:
            return model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the model."""
        with self.switched() as model:
            return model.generate(*args, **kwargs)

    @contextmanager
    def switched(self) -> Iterator[Any]:
        """Give the model itself as this view sees it, for the length of a ``with`` block.

        :raises RuntimeError: an adapter is merged into the weights.
        """
        (switch,) = self._switch
        turned = _turned(self.model, self.adapter) if switch is None else switch.off()
        modes = [(module, module.training) for module in self.model.modules()]
        with turned:
            try:
                for module, _ in modes:
                    module.training = False
                with torch.no_grad():
                    yield self.model
            finally:
                for module, mode in modes:
                    module.training = mode


class _Backbone(nn.Module):
    """The model of a view without its head."""

    def __init__(self, view: AdapterView) -> None:
        super().__init__()
        self._view = (view,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._view[0].switched() as model:
            return _base_of(model).base_model(*args, **kwargs)


def _base_of(model: Any) -> Any:
    """Return the transformers model: PEFT has it inside, others may have changed it in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _turned(model: PeftModel, adapter: str | None) -> Iterator[None]:
    """Turn PEFT's adapters off, or ``adapter`` on and the others off, for a block."""
    layers: list[Any] = [m for m in model.modules() if _switches(m)]
    if any(getattr(layer, "merged", False) for layer in layers):
        raise RuntimeError("adapters are merged into the model's weights: unmerge them first")
    switches = [(la, la._disable_adapters, la._active_adapter) for la in layers]
    try:
        for layer, _, active in switches:
            layer._disable_adapters = adapter is None
            if adapter is not None and active:
                # A name or a list of names, depending on layer and version of peft.
                layer._active_adapter = adapter if isinstance(active, str) else [adapter]
        yield
    finally:
        for layer, disabled, active in switches:
            layer._disable_adapters, layer._active_adapter = disabled, active


def _switches(module: Any) -> bool:
    return isinstance(module, BaseTunerLayer | _auxiliary_wrapper())


def unsuited(model: nn.Module, switch: AdapterSwitch | None) -> str | None:
    """Say why a model has no such view, after its name; None if it has one."""
    if switch is not None:
        return None
    if not isinstance(model, PeftModel):
        return f"is a {type(model).__name__} without an adapter of PEFT"
    if not isinstance(model.base_model, BaseTuner):
        return "has an adapter that is not in the layers of its base and cannot be turned off there"
    return None


def adapters(model: PeftModel) -> list[str]:
    """Return the names of a model's adapters."""
    return list(model.peft_config)


def trained_beside(model: nn.Module, switch: AdapterSwitch | None) -> list[str]:
    """Return the parameters that are trained and that turning the adapter off leaves in place."""
    own = {id(parameter) for parameter in _of_adapters(model, switch)}
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own]


@dataclass(frozen=True)
class Sizes:
    """What a model consists of."""

    adapter: int
    """Elements in the adapters' parameters."""
    adapter_bytes: int
    """Their bytes."""
    base_bytes: int
    """Bytes of all others."""


def sizes(model: nn.Module, switch: AdapterSwitch | None) -> Sizes:
    """Count adapters and base."""
    own = {id(parameter): parameter for parameter in _of_adapters(model, switch)}.values()
    held = sum(map(partitions.nbytes, own))
    every = sum(map(partitions.nbytes, model.parameters()))
    return Sizes(sum(p.numel() for p in own), held, every - held)


def _of_adapters(model: nn.Module, switch: AdapterSwitch | None) -> Iterator[nn.Parameter]:
    if switch is not None:
        yield from switch.parameters()
        return
    wrapper = _auxiliary_wrapper()
    for module in model.modules():
        if isinstance(module, wrapper):
            base = {id(p) for p in module.original_module.parameters()}
        elif isinstance(module, BaseTunerLayer):
            base = {id(p) for p in module.get_base_layer().parameters()}
        else:
            continue
        yield from (p for p in module.parameters() if id(p) not in base)


def add_frozen_copy(model: PeftModel, name: str) -> None:
    """Give a model a second adapter that holds what its active one holds, and is never trained.

    As TRL's trainers make their adapter ``ref``. It is active in no call but those of its view.

    :raises LoadFailedError: the adapter is partitioned over ranks.
    """
    active = model.active_adapter
    before = {id(tensor) for tensor in _tensors(model).values()}
    wants = [(p, p.requires_grad) for p in model.parameters()]
    config = copy.deepcopy(model.peft_config[active])
    config.inference_mode = True
    if hasattr(config, "init_lora_weights"):
        # The values come from the other adapter. Some initialisations would take theirs from the
        # base once more.
        config.init_lora_weights = False
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(name, config)
    tensors = _tensors(model)
    for made, tensor in tensors.items():
        if id(tensor) in before:
            continue
        source = tensors[_replaced(made, name, active)]
        if is_partitioned(source) or is_partitioned(tensor):
            raise LoadFailedError(
                f"{made!r} is partitioned over the ranks, and cannot be copied as it is",
                fix="Load a second model with `like`.",
            )
        tensor.data = source.detach().clone()
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(False)
    for parameter, wanted in wants:
        parameter.requires_grad_(wanted)
    model.peft_config[name].init_lora_weights = getattr(
        model.peft_config[active], "init_lora_weights", None
    )
    model.train(model.training)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _replaced(name: str, adapter: str, other: str) -> str:
    """Return a tensor's name with the last part that is the adapter's name replaced."""
    parts = name.split(".")
    at = len(parts) - 1 - parts[::-1].index(adapter)
    return ".".join([*parts[:at], other, *parts[at + 1 :]])


def _auxiliary_wrapper() -> type[Any]:
    """Return PEFT's class around what it trains beside its layers; before 0.16 there was but one,
    for ``modules_to_save``."""
    from peft.utils import other

    return getattr(other, "AuxiliaryTrainingWrapper", other.ModulesToSaveWrapper)  # type: ignore[no-any-return]
