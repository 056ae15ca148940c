"""One order for all plugins: ``after`` and ``before`` first, then the name."""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter

from llmload.errors import PluginError

LAST = "*"


def plan_order(plugins: Mapping[str, object]) -> list[str]:
    """Sort plugins topologically, ties by name, so that one set of plugins has one order.

    Names in ``after`` and ``before`` that are not among ``plugins`` are ignored: they say what
    would hold if that plugin took part. ``after = ("*",)`` means after all that neither say so too
    nor have asked to come later than this one.

    :raises PluginError: the wishes contradict each other; the message shows the circle.
    """
    after = {name: set(getattr(plugin, "after", ())) for name, plugin in plugins.items()}
    for name, plugin in plugins.items():
        for other in set(getattr(plugin, "before", ())) & plugins.keys():
            after[other].add(name)
    last = {name for name, others in after.items() if LAST in others}
    later = {name: _later_than(name, after) for name in last}
    for name in last:
        after[name] |= plugins.keys() - last - later[name]
    sorter = TopologicalSorter(
        {name: sorted(others & plugins.keys()) for name, others in after.items()}
    )
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        raise PluginError(
            f"the plugins cannot be ordered: {circle}, each of which wants to come before the next",
            fix="Change `after` or `before` of one of them, or leave one out with `-p no:NAME`.",
        ) from None
    order: list[str] = []
    # get_ready gives all that could come next; taking one at a time by name makes ties stable.
    waiting: set[str] = set()
    while sorter.is_active():
        waiting.update(sorter.get_ready())
        name = min(waiting)
        waiting.remove(name)
        order.append(name)
        sorter.done(name)
    return order


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
