"""Plan and report as a page: one file that needs no other, for a browser or a notebook's cell.

Both show themselves by it, so that here their types are not known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llmload.context.forecast import PHASES
from llmload.spec.wording import pattern, size_text

if TYPE_CHECKING:
    from jinja2 import Template


_LARGEST: Final = 20
_WIDTH, _HEIGHT = 720, 150
"""Of the drawing of a load, in its own units."""


def of_plan(plan: Any) -> str:
    """Return a plan as a part of a page."""
    return _template("plan.html.j2").render(plan=plan, **_words(plan))


def of_load(plan: Any, reports: Sequence[Any]) -> str:
    """Return a load as a part of a page.

    :param reports: of every rank, in their order.
    """
    report = reports[0]
    return _template("load.html.j2").render(
        plan=plan,
        report=report,
        ranks=[_timeline(each) for each in reports],
        **_words(plan or report),
    )


def whole(title: str, parts: Mapping[str, str]) -> str:
    """Return a page of its own.

    :param parts: what :func:`of_plan` and :func:`of_load` gave, by their headings.
    """
    return _template("page.html.j2").render(title=title, parts=parts)


@lru_cache
def _template(name: str) -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # comes with torch

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = size_text
    return environment.get_template(name)


def _words(of: Any) -> dict[str, Any]:
    """Return what templates say of memory and tensors."""
    memory = of.memory
    routes = [] if memory is None else memory.routes
    ways: dict[tuple[str, str, str], list[int]] = {}
    for route in routes:
        found = ways.setdefault((route.route, route.plugin, route.why), [0, 0, 0])
        for place, number in enumerate((1, route.stored_bytes, route.kept_bytes)):
            found[place] += number
    return {
        "memory": memory,
        "phases": PHASES,
        "ways": [(*key, *numbers) for key, numbers in ways.items()],
        "largest": sorted(routes, key=lambda route: -route.kept_bytes)[:_LARGEST],
        "routes": routes,
        "pattern": pattern,
    }


def _timeline(report: Any) -> dict[str, Any]:
    """Return what the drawing of one rank's load needs: bars of time, and a line of memory."""
    end = max((phase.start + phase.seconds for phase in report.phases), default=0) or 1e-9
    top = max((phase.peak_rss_mib for phase in report.phases), default=0) or 1
    bars = [
        {
            "name": phase.name,
            "plugin": phase.plugin,
            "x": _WIDTH * phase.start / end,
            "width": max(1.0, _WIDTH * phase.seconds / end),
            "phase": phase,
        }
        for phase in report.phases
    ]
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "bars": bars,
        "line": " ".join(_points(report, end, top)),
        "top": size_text(round(top * 2**20)),
        "seconds": report.seconds,
        "beside": report.foretold_and_measured(),
    }


def _points(report: Any, end: float, top: float) -> Iterator[str]:
    for phase in report.phases:
        height = _HEIGHT * (1 - (phase.rss_mib or phase.peak_rss_mib) / top)
        yield f"{_WIDTH * (phase.start + phase.seconds) / end:.1f},{height:.1f}"
