"""Which versions of transformers are supported, and the line of the installed one.

The streaming loader needs private functions, which it compares first: on the versions where they
differ it declines, and ``from_pretrained`` does the work.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from llmload.errors import PluginError

if TYPE_CHECKING:
    from llmload.hf.interface import Transformers

_SUPPORTED = (((4, 51, 3), (5,)), ((5, 3), (6,)))
"""Ranges of releases, the second of each pair excluded. 5.0 to 5.2 build models in a way of their
own."""
SUPPORTED = "4.51.3 and newer below 5, or 5.3 and newer below 6"


def refuse_unsupported(version: str) -> None:
    """Raise for a version of transformers that is not supported.

    :raises PluginError: with the version found and those allowed.
    """
    release = _release(version)
    if not any(first <= release < end for first, end in _SUPPORTED):
        raise PluginError(
            f"transformers {version} is installed, and llmload supports {SUPPORTED}",
            fix="Install one of them, such as `pip install 'transformers>=5.3,<6'`.",
        )


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers a version begins with: of ``5.24.0.dev0`` (5, 24, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


@cache
def installed_transformers() -> Transformers:
    """Return what llmload knows of the installed transformers.

    :raises PluginError: its version is not supported.
    """
    import transformers

    refuse_unsupported(transformers.__version__)
    if _release(transformers.__version__) < (5,):
        from llmload.hf import v4_51

        return v4_51
    from llmload.hf import v5

    return v5
