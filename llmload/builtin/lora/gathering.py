"""Weights whole where PEFT looks at their values, whoever keeps them in parts.

PEFT asks one function to gather what DeepSpeed has partitioned: before it decomposes a weight,
takes its norm or copies rows of it. That function knows DeepSpeed alone. Imported lazily: it needs
torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn

from llmload.plugin import partitions

_FUNCTION: Final = "gather_params_ctx"


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Let PEFT find parted weights whole, each for as long as it needs it.

    Nothing happens where DeepSpeed has them, or nobody.
    """
    if not any(hasattr(parameter, "parted") for parameter in model.parameters()):
        yield
        return
    users = [module for name, module in [*sys.modules.items()] if _uses(name, module)]
    before = {module: getattr(module, _FUNCTION) for module in users}
    for module in users:
        setattr(module, _FUNCTION, _whole)
    try:
        yield
    finally:
        for module, function in before.items():
            setattr(module, _FUNCTION, function)


def _uses(name: str, module: Any) -> bool:
    return name.startswith("peft.") and _FUNCTION in vars(module)


@contextmanager
def _whole(
    param: torch.Tensor | Iterable[torch.Tensor], *args: Any, **options: Any
) -> Iterator[None]:
    tensors = [param] if isinstance(param, torch.Tensor) else list(param)
    with partitions.whole(tensors):
        yield
