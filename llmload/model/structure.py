"""What of a model decides how its forward runs, to tell whether somebody has changed it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmload.model import partitions

if TYPE_CHECKING:
    from torch import nn


def of(model: nn.Module) -> dict[str, Any]:
    """Return of each module, by its path: class, hooks, whether its forward was replaced, and shape
    and dtype of its parameters. Two that are equal run alike, as far as modules tell."""
    return {
        path: (
            type(module),
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            vars(module).get("forward"),
            {
                name: (partitions.shape(parameter), parameter.dtype)
                for name, parameter in module._parameters.items()
                if parameter is not None
            },
        )
        for path, module in model.named_modules()
    }
