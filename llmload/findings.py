"""What hooks say besides doing their work: notes, refusals and data about other sections.

``Problem`` (in :mod:`llmload.errors`) is the third kind of finding a ``check`` may yield.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Note:
    """A line of the plan: what the plugin is going to do in this load."""

    text: str | Callable[[], str]
    """What the plan shows; a function is called when every plugin has been asked, for what others
    decide on."""

    def __str__(self) -> str:
        return self.text if isinstance(self.text, str) else self.text()


@dataclass(frozen=True)
class Decline:
    """A plugin's "not me, ask the next one", with the reason that the plan shows.

    Yielded by ``check`` a loader is never asked; returned by ``load`` or ``wrap_adapter`` the next
    plugin is asked. ``None`` never means this: it is what a forgotten ``return`` gives.
    """

    reason: str
    loader: str = ""
    """For ``check``: the loader that is not to be asked, where it is another plugin's."""


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """A pair of settings that cannot both hold, as data on the plugin that knows.

    ``key`` is another plugin's section or a core key of the spec. The conflict holds when that key
    is set, and ``when(section, other)`` (if given) is true of the two values.
    """

    key: str
    reason: str
    fix: str
    when: Callable[[Any, Any], bool] | None = None
