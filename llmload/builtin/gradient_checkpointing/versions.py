"""What transformers and torch can do of gradient checkpointing, by version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmload.plugin import release_of

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


def checkpoints_selectively() -> bool:
    """Say whether transformers can checkpoint every n-th layer and keep activations on the host."""
    from transformers import PreTrainedModel

    return hasattr(PreTrainedModel, "activation_checkpointing_enable")


def checkpoints_gradients(model_class: type[PreTrainedModel]) -> bool:
    """Say whether a class can checkpoint gradients. In 4.51.3 Starcoder2 says so and never does."""
    if release_of("transformers") < (5,) and model_class.__name__.startswith("Starcoder2"):
        return False
    return bool(model_class.supports_gradient_checkpointing)


def enable_checkpointing(
    model: PreTrainedModel, options: dict[str, Any], *, every_n_layers: int, offload: bool
) -> None:
    """Turn on gradient checkpointing, which was renamed with 5.23 and takes more since.

    Under the old name ``every_n_layers`` and ``offload`` are unknown and must not be asked for: see
    :func:`checkpoints_selectively`.
    """
    if checkpoints_selectively():
        model.activation_checkpointing_enable(options, every_n_layers, offload)
    else:
        model.gradient_checkpointing_enable(options)


def require_input_gradients(model: PreTrainedModel) -> None:
    """Make the embedded tokens require gradients though nothing in the embedding does.

    4.51.3 forgets where encoder and decoder have embeddings beside the model's, tied to it or not
    (BART, LongT5). ``disable_input_require_grads`` undoes it all.
    """
    model.enable_input_require_grads()
    if release_of("transformers") >= (5,) or not hasattr(model, "get_encoder"):
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


def has_accelerator() -> bool:
    """Say whether torch has an accelerator here. ``torch.accelerator`` came with torch 2.6."""
    import torch

    return (
        torch.accelerator.is_available()
        if hasattr(torch, "accelerator")
        else torch.cuda.is_available()
    )
