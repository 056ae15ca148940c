"""Which settings cannot be combined, by what plugins declare: asked by every plan, and a table.

The one source of both: a plan keeps what holds of its own settings, ``llmload compat`` shows all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field

from llmload.context.peers import ABILITIES, EXCLUSIVE
from llmload.errors import Conflict, Problem
from llmload.host import tested
from llmload.host.discovery import PluginInfo


@dataclass(frozen=True, kw_only=True)
class Clash:
    """Two settings that a plugin, or the host, declares not to go together."""

    plugin: str
    """Who declares it; its section is the first of the two."""
    other: str
    """A section or a core key."""
    reason: str
    fix: str
    when: Callable[[Any, Any], bool] | None = None
    """Of the two values, whether it holds; None: always."""

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Say whether it holds of the values of a spec, sections and core keys by name."""
        if self.when is None:
            return True
        return bool(self.when(values.get(self.plugin), values.get(self.other)))

    def problem(self) -> Problem:
        """Return what a plan says."""
        return Problem(
            where=self.plugin,
            plugin=self.plugin,
            message=f"{self.plugin!r} cannot be combined with {self.other!r}: {self.reason}",
            fix=self.fix,
        )


def clashes(plugins: Mapping[str, Any], keys: Iterable[str]) -> Iterator[Clash]:
    """Yield every pair that is declared among plugins, and between them and core keys.

    :param plugins: name -> plugin, in plan order.
    :param keys: core keys of a spec.
    """
    known = {*keys, *(name for name, plugin in plugins.items() if getattr(plugin, "Section", None))}
    for name, plugin in plugins.items():
        conflicts: Iterable[Conflict] = getattr(plugin, "conflicts", ())
        for conflict in conflicts:
            for other in _opponents(name, conflict, plugins, known):
                yield Clash(
                    plugin=name,
                    other=other,
                    reason=conflict.reason,
                    fix=conflict.fix,
                    when=conflict.when,
                )
    for ability in EXCLUSIVE:
        able = [name for name, plugin in plugins.items() if ability in _provides(plugin)]
        for name in able[1:]:
            yield Clash(
                plugin=name,
                other=able[0],
                reason=f"each of them {ABILITIES[ability]}",
                fix=f"Remove `{name}` or `{able[0]}`.",
            )


def _opponents(
    mine: str, conflict: Conflict, plugins: Mapping[str, Any], known: set[str]
) -> Iterator[str]:
    if conflict.key in known:
        yield conflict.key
    for name, plugin in plugins.items():
        if conflict.ability in _provides(plugin) and name != mine:
            yield name


def _provides(plugin: Any) -> Iterable[str]:
    provides: Iterable[str] = getattr(plugin, "provides", ())
    return provides


# --- the table ------------------------------------------------------------------------------------


class Pair(BaseModel):
    """Two settings of a spec, and whether they go together."""

    one: str
    """A section."""
    other: str
    """Another section, or a core key."""
    works: Literal["no", "depends"]
    """``no``: refused by every plan; ``depends``: refused for some values of the two."""
    reason: str
    """Why not, or when not."""
    fix: str
    """What to do instead."""
    plugin: str
    """Who declares it."""


class OnStack(BaseModel):
    """How far a section works on one of the two sets of versions that are tested."""

    section: str
    stack: str
    works: Literal["yes", "in part", "no"]
    reason: str = ""


class Compatibility(BaseModel):
    """What goes with what. Pairs of sections that are not listed go together."""

    sections: list[str]
    """All that can be in a spec here, by name."""
    pairs: list[Pair] = Field(default_factory=list)
    """Those that do not, or not always."""
    stacks: list[OnStack] = Field(default_factory=list)
    """Of the built-in sections."""

    def between(self, one: str, other: str) -> list[Pair]:
        """Return what is declared of two settings, whichever of them declares it."""
        return [pair for pair in self.pairs if {pair.one, pair.other} == {one, other}]


def table(infos: Iterable[PluginInfo], keys: Iterable[str]) -> Compatibility:
    """Return the table of plugins that are installed."""
    plugins = {info.name: info.plugin for info in infos}
    sections = [name for name, plugin in plugins.items() if getattr(plugin, "Section", None)]
    return Compatibility(
        sections=sections,
        pairs=[
            Pair(
                one=clash.plugin,
                other=clash.other,
                works="no" if clash.when is None else "depends",
                reason=clash.reason,
                fix=clash.fix,
                plugin=clash.plugin,
            )
            for clash in clashes(plugins, keys)
        ],
        stacks=[
            OnStack(section=name, stack=stack, works=works, reason=reason)
            for name, found in tested.ON_STACKS.items()
            if name in plugins
            for stack, (works, reason) in found.items()
        ],
    )
