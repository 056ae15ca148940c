"""What one plugin may know of the others in a load: what they declare, and the hooks they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

ABILITIES: Final = {
    "adapter": "puts an adapter around the model",
    "embeddings": "makes the embeddings as large as the tokenizer",
    "gradient_checkpointing": "turns gradient checkpointing on or off",
    "mapped_pages": "a loader that leaves what it need not cast on the pages of the files",
    "placement": "a loader that asks `ctx.placement` for each weight",
    "quantisation": "answers for quantised weights: it makes them, or takes over those of a"
    " checkpoint",
}
"""What a plugin can say in ``provides`` that others know how to ask for. One of its own begins with
the plugin's name and a dot. Where a section asks for a load without one of them, it has it in its
property ``withholds``, a frozenset."""
EXCLUSIVE: Final = ("adapter", "quantisation")
"""Abilities of which a load has room for one plugin."""


@dataclass(frozen=True)
class Peer:
    """One plugin that takes part in a load, as far as it declares itself to the others."""

    distribution: str
    """Distribution and version, or where a plugin object came from."""
    provides: frozenset[str] = frozenset()
    """See :data:`ABILITIES`."""


class Hooks(Protocol):
    """The hooks that plugins of this load declare themselves, in their class ``Hooks``."""

    hook: Any
    """pluggy's own callers, for ``ctx.hook``, which goes."""

    def declared(self, hook: str) -> bool:
        """Say whether a plugin that takes part declares this hook."""
        ...

    def implementing(self, hook: str, *, wrappers: bool = False) -> list[str]:
        """Names of the plugins that implement a declared hook, or wrap it too, in plan order."""
        ...

    def each(self, hook: str, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """Ask one plugin after the other, in plan order; yield its name and what it returned.

        A hook that yields is run to its end, and gives a list. Wrappers go around each answer.

        :raises LoadFailedError: a plugin failed; what it meant to raise comes with its name.
        """
        ...

    def first(self, hook: str, **kwargs: Any) -> tuple[str | None, Any]:
        """Ask in plan order until one does not return None; return its name and its answer.

        For a hook that is declared with ``firstresult=True``. Wrappers go around the whole, and
        have the last word: what they make of the answer is returned, with no name where nobody else
        had one.

        :raises LoadFailedError: as :meth:`each`.
        """
        ...
