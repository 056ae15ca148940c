"""The adapter itself: narrow layers behind modules of a model, which keep their names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

if TYPE_CHECKING:
    from llmload_bottleneck.section import Shape

CHILD: Final = "bottleneck_adapter"
"""What a bottleneck is called in the module that it stands behind."""


class Bottleneck(nn.Module):
    """Adds to hidden states what two linear layers with an activation make of them.

    The second one starts at zero, so that the model starts as its base.

    :param width: of the hidden states, in and out.
    """

    def __init__(
        self, width: int, shape: Shape, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.shape = shape
        self.enabled = True
        self.down = nn.Linear(width, shape.size, dtype=dtype, device=device)
        self.up = nn.Linear(shape.size, width, dtype=dtype, device=device)
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the hidden states with the adapter's part, in their own dtype."""
        if not self.enabled:
            return hidden
        narrow = self.down(hidden.to(self.down.weight.dtype))
        added: torch.Tensor = self.up(getattr(nn.functional, self.shape.activation)(narrow))
        return hidden + added.to(hidden.dtype)


def adapt(module: nn.Module, args: Any, output: Any) -> Any:
    """Be the forward hook of an adapted module; of several outputs the first one is adapted."""
    bottleneck = module.get_submodule(CHILD)
    if isinstance(output, tuple):
        return (bottleneck(output[0]), *output[1:])
    return bottleneck(output)


def attach(module: nn.Module, bottleneck: Bottleneck) -> None:
    """Let the output of ``module`` go through ``bottleneck``."""
    module.add_module(CHILD, bottleneck)
    module.register_forward_hook(adapt)


def bottlenecks(model: nn.Module) -> Iterator[tuple[str, Bottleneck]]:
    """Yield the adapter's layers with their names in the model."""
    for name, module in model.named_modules():
        if isinstance(module, Bottleneck):
            yield name, module


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters by their names in the model."""
    return {
        f"{path}.{name}": parameter
        for path, layer in bottlenecks(model)
        for name, parameter in layer.named_parameters()
    }


class Switch:
    """Turns the adapter of a model off, for whoever wants its base."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [layer for _, layer in bottlenecks(model)]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the adapter's parameters."""
        for layer in self._layers:
            yield from layer.parameters()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let hidden states pass the bottlenecks as they are, for a block."""
        before = [layer.enabled for layer in self._layers]
        try:
            for layer in self._layers:
                layer.enabled = False
            yield
        finally:
            for layer, enabled in zip(self._layers, before, strict=True):
                layer.enabled = enabled
