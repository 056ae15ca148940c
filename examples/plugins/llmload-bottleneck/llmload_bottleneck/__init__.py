"""Bottleneck adapters for :mod:`llmload`, without PEFT. Importing this package imports no torch."""

from __future__ import annotations

from typing import Any

__all__ = ["save"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llmload_bottleneck import files  # imports torch

    return getattr(files, name)
