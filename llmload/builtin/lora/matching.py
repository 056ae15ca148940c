"""PEFT's own matching of names, held to a budget of time.

It gives regular expressions of the spec and of a saved adapter to Python's matcher, which may try
for ever: target modules, patterns of ranks and alphas, the pattern of layers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmload.plugin import patterns


class _Budgeted:
    """Stands for the module ``re`` in the modules of PEFT."""

    search = staticmethod(patterns.search)
    match = staticmethod(patterns.match)
    fullmatch = staticmethod(patterns.fullmatch)

    def __getattr__(self, name: str) -> Any:
        return getattr(re, name)


@contextmanager
def within_budget() -> Iterator[None]:
    """Let PEFT match names within a budget; what takes longer is a ``RequestError``."""
    users = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("peft.") and vars(module).get("re") is re
    ]
    budgeted: Any = _Budgeted()
    try:
        for module in users:
            setattr(module, "re", budgeted)  # noqa: B010 - no module declares it
        yield
    finally:
        for module in users:
            setattr(module, "re", re)  # noqa: B010
