"""What PEFT computes of quantised weights, where the rehearsal has none: their shapes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import integrations

if TYPE_CHECKING:
    from torch import nn

_QUANTISED = ("Params4bit", "Int8Params")


def is_quantised(model: nn.Module) -> bool:
    """Say whether weights of a model are, or are to be, in 8 or 4 bits."""
    return any(type(parameter).__name__ in _QUANTISED for parameter in model.parameters())


@contextmanager
def dequantised_by_shape(dtype: torch.dtype) -> Iterator[None]:
    """Let PEFT dequantise weights on the meta device, which have no statistics to do it by.

    DoRA asks for the weight of each layer when it is made, for its norms.

    :param dtype: that of the weights that quantisation began with.
    """
    dequantise = integrations.dequantize_module_weight

    def by_shape(module: Any) -> Any:
        weight = module.weight
        if weight.is_meta and type(weight).__name__ in _QUANTISED:
            shape = (module.out_features, module.in_features)
            return torch.empty(shape, dtype=dtype, device="meta")
        return dequantise(module)

    users = [
        module
        for name, module in list(sys.modules.copy().items())
        if name.startswith("peft.") and vars(module).get(dequantise.__name__) is dequantise
    ]
    try:
        for module in users:
            setattr(module, dequantise.__name__, by_shape)
        yield
    finally:
        for module in users:
            setattr(module, dequantise.__name__, dequantise)
