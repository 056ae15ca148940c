"""Gradient checkpointing in transformers 5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def checkpoints_gradients(model_class: type[PreTrainedModel]) -> bool:
    """As the class says."""
    return bool(model_class.supports_gradient_checkpointing)


def checkpoints_selectively() -> bool:
    """Since 5.23, under another name for all of it."""
    from transformers import PreTrainedModel

    return hasattr(PreTrainedModel, "activation_checkpointing_enable")


def enable_checkpointing(
    model: PreTrainedModel, options: dict[str, Any], *, every_n_layers: int, offload: bool
) -> None:
    """By its name of that version."""
    if checkpoints_selectively():
        model.activation_checkpointing_enable(options, every_n_layers, offload)
    else:
        model.gradient_checkpointing_enable(options)


def require_input_gradients(model: PreTrainedModel) -> None:
    """transformers finds every embedding."""
    model.enable_input_require_grads()
