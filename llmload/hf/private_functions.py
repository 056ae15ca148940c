"""Whether the private functions of transformers that a line relies on are still the same."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any


def first_difference(signatures: Mapping[str, str], version: str) -> str | None:
    """Say which function differs from that of ``version``; None where all are as expected.

    :param signatures: ``module:qualified.name`` below transformers -> names of its parameters.
    """
    for path, expected in signatures.items():
        module, _, name = path.partition(":")
        try:
            found: Any = importlib.import_module(f"transformers.{module}")
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            return f"this transformers has no {name}"
        if _parameters(found) != expected:
            return f"{name} of this transformers takes other arguments than that of {version}"
    return None


@cache  # plan and load ask several times; a function that was put in another's place is another key
def _parameters(function: Callable[..., Any]) -> str:
    return " ".join(inspect.signature(function).parameters)
