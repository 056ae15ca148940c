"""One order for all plugins: by stage, then by name; ``after`` and ``before`` for exceptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from llmload.errors import PluginError
from llmload.hookspecs import STAGES

LAST = "*"
_PLACE = {stage: place for place, stage in enumerate(STAGES)}


class CircleError(PluginError):
    """Plugins want to come before one another, in a circle."""

    def __init__(self, circle: Sequence[str]) -> None:
        self.circle = tuple(circle)
        super().__init__(
            f"the plugins cannot be ordered: {' -> '.join(circle)}, each of which wants to come"
            " before the next",
            fix="Change `after` or `before` of one of them, or leave one out with `-p no:NAME`.",
        )


def stage_of(plugin: object) -> str:
    """Return the stage at which a plugin acts: the one it names, or the one its hooks tell of."""
    named: str | None = getattr(plugin, "stage", None)
    if named is not None:
        return named
    if callable(getattr(plugin, "load", None)):
        return "load"
    return "adapter" if callable(getattr(plugin, "wrap_adapter", None)) else "model"


def plan_order(plugins: Mapping[str, object]) -> list[str]:
    """Sort plugins by stage and name, so that one set of plugins has one order.

    ``after`` and ``before`` always hold, and take the plugin that says so out of its stage where
    they must. Names in them that are not among ``plugins`` are ignored: they say what would hold if
    that plugin took part. ``after = ("*",)`` means after all that neither say so too nor have asked
    to come later than this one.

    :raises CircleError: the wishes contradict each other; the message shows the circle.
    """
    after = {name: set(getattr(plugin, "after", ())) for name, plugin in plugins.items()}
    for name, plugin in plugins.items():
        for other in set(getattr(plugin, "before", ())) & plugins.keys():
            after[other].add(name)
    last = {name for name, others in after.items() if LAST in others}
    later = {name: _later_than(name, after) for name in last}
    for name in last:
        after[name] |= plugins.keys() - last - later[name]
    earlier = {name: sorted(others & plugins.keys()) for name, others in after.items()}
    sorter = TopologicalSorter(earlier)
    try:
        possible = list(TopologicalSorter(earlier).static_order())
    except CycleError as error:
        raise CircleError(error.args[1]) from None
    place = _places(plugins, possible)
    sorter.prepare()
    order: list[str] = []
    # get_ready gives all that could come next; taking one at a time makes ties stable.
    waiting: set[str] = set()
    while sorter.is_active():
        waiting.update(sorter.get_ready())
        name = min(waiting, key=lambda one: (place[one], one))
        waiting.remove(name)
        order.append(name)
        sorter.done(name)
    return order


def _places(plugins: Mapping[str, object], possible: list[str]) -> dict[str, int]:
    """Return the place of each plugin's stage, moved by its own exceptions.

    A plugin that wants to come after one of a later stage acts no earlier than that one, and one
    that wants to come before one of an earlier stage no later: it moves, and its peers stay.

    :param possible: an order in which all exceptions hold.
    """
    place = {name: _PLACE.get(stage_of(plugin), 0) for name, plugin in plugins.items()}
    for name in possible:
        others = set(getattr(plugins[name], "after", ()))
        if LAST in others:
            place[name] = len(STAGES)
        place[name] = max([place[name], *(place[one] for one in others & plugins.keys())])
    for name in reversed(possible):
        others = set(getattr(plugins[name], "before", ())) & plugins.keys()
        place[name] = min([place[name], *(place[one] for one in others)])
    return place


def _later_than(name: str, after: Mapping[str, set[str]]) -> set[str]:
    """Return the plugins that asked to come after ``name``, directly or through others."""
    later: set[str] = set()
    waiting = [name]
    while waiting:
        one = waiting.pop()
        found = {other for other, wishes in after.items() if one in wishes} - later
        later |= found
        waiting += found
    return later
