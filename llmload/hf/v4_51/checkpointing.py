"""Gradient checkpointing in transformers 4.51.3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


def checkpoints_gradients(model_class: type[PreTrainedModel]) -> bool:
    """As the class says, but for Starcoder2, which never does."""
    if model_class.__name__.startswith("Starcoder2"):
        return False
    return bool(model_class.supports_gradient_checkpointing)


def checkpoints_selectively() -> bool:
    """It checkpoints all layers or none."""
    return False


def enable_checkpointing(
    model: PreTrainedModel, options: dict[str, Any], *, every_n_layers: int, offload: bool
) -> None:
    """All layers; ``every_n_layers`` and ``offload`` are unknown here."""
    model.gradient_checkpointing_enable(options)


def require_input_gradients(model: PreTrainedModel) -> None:
    """transformers forgets where encoder and decoder have embeddings beside the model's, tied to it
    or not (BART, LongT5)."""
    model.enable_input_require_grads()
    if not hasattr(model, "get_encoder"):
        return
    halves = (model.get_encoder(), model.get_decoder())
    found = {id(m): m for half in halves if (m := getattr(half, "embed_tokens", None)) is not None}
    found.pop(id(model.get_input_embeddings()), None)

    def require(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        output.requires_grad_(True)

    hooks = [module.register_forward_hook(require) for module in found.values()]
    model._require_grads_hook = _Hooks([model._require_grads_hook, *hooks])


class _Hooks:
    """Several hooks, removed as one."""

    def __init__(self, hooks: list[Any]) -> None:
        self._hooks = hooks

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
