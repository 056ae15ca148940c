"""Modules that ZeRO-3 must gather as one: mixtures whose experts are modules of their own.

Each rank runs the experts that its own tokens chose. If DeepSpeed gathered expert by expert, ranks
would wait for one another in different collectives, forever.

Imported lazily, by functions: this module needs torch and deepspeed.
"""

from __future__ import annotations

from collections.abc import Collection

from deepspeed.utils.z3_leaf_module import set_z3_leaf_module
from torch import nn

EXPERTS = ("experts",)
"""What the architectures of transformers call a list or mapping of experts."""

CLASSES = ("LongcatFlashMoE",)
"""Other modules that ranks may use in different ways: all tokens of one rank can choose experts
without weights, and DeepSpeed waits for the gradients that the other ranks have."""


def mark_leaf_modules(model: nn.Module, named: Collection[str]) -> list[str]:
    """Have DeepSpeed gather mixtures of experts as one; return the names of their classes.

    Experts whose weights are stacked in one parameter, as in transformers 5, need no mark.

    :param named: names of further classes.
    """
    found = [
        module
        for module in model.modules()
        if type(module).__name__ in {*CLASSES, *named}
        or any(
            isinstance(getattr(module, name, None), nn.ModuleList | nn.ModuleDict)
            for name in EXPERTS
        )
    ]
    # DeepSpeed keeps the mark on the module itself, so that it holds in `initialize` too.
    for module in found:
        set_z3_leaf_module(module, True)
    return sorted({type(module).__name__ for module in found})
