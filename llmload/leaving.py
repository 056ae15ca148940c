"""What is public and will not be: a release warns before anything is removed.

To remove something, write it down here for the release that warns, and let it warn: a name of a
public module does so by itself, an attribute calls :func:`warn`, a hook or one of its arguments
gets ``hookspec(warn_on_impl=leaving.warning(...))`` or ``warn_on_impl_args``. An entry stays when
the thing is gone, so that who still asks for it is told where to go.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple


class Leaving(NamedTuple):
    """Something public that goes."""

    warns: str
    """The release that warns."""
    gone: str
    """The first release without it."""
    instead: str
    """What to do, in one imperative sentence."""


LEAVING: Final[Mapping[str, Leaving]] = MappingProxyType(
    {
        "LoadContext.hook": Leaving(
            "0.2.0",
            "0.3.0",
            "Call `ctx.hooks.each` or `ctx.hooks.first`, which say who answered.",
        ),
    }
)
"""``module.name``, ``Class.attribute``, ``hook`` or ``hook.argument`` -> when and what instead."""


class LeavingWarning(DeprecationWarning):
    """Something is used that a coming release lacks."""


def warning(name: str) -> LeavingWarning:
    """Return what to warn with: a key of :data:`LEAVING`, when it goes, and what to do."""
    leaving = LEAVING[name]
    return LeavingWarning(f"`{name}` goes with llmload {leaving.gone}. {leaving.instead}")


def warn(name: str) -> bool:
    """Warn whoever called the caller, if the name is one that goes; say whether it is."""
    if name not in LEAVING:
        return False
    warnings.warn(warning(name), stacklevel=3)
    return True


def lacking(module: str, name: str) -> AttributeError:
    """Return the error of a module that has no such name, with the way where it had one."""
    leaving = LEAVING.get(f"{module}.{name}")
    way = f": it went with llmload {leaving.gone}. {leaving.instead}" if leaving is not None else ""
    return AttributeError(f"module {module!r} has no attribute {name!r}{way}")
