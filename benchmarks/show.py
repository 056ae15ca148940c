"""Results as a line and as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .case import OURS
from .compare import Row


def line(row: Row) -> str:
    """Return one result in one line."""
    parts = []
    for name, side in row["sides"].items():
        phase, ratio = side["phases"][0], side["ratio"]
        compared = f" ({ratio['median']:.2f}x)" if ratio else ""
        parts.append(
            f"{name} {phase['seconds']['median']:.3g} s{compared},"
            f" peak RSS +{phase['peak_rss_mib']['median']:.0f} MiB"
        )
    return f"{row['case']} {row['size']} ({row['stack']}): " + "; ".join(parts)


def page(results: dict[str, Any]) -> str:
    """Return a topic's results as a Markdown page."""
    rows = results["rows"]
    marks = _marks(rows)
    head = [
        f"# {results['title']}",
        "",
        "Medians over alternating runs (lowest to highest in brackets), each in processes of its"
        " own. With several ranks, seconds are the slowest rank's and memory is the largest"
        " rank's. MiB are above the process before the load, imports done; for whole processes"
        " and for PSS (the sum of all ranks' peaks, from one more run) they are totals. The ratio"
        f" is {OURS}'s time over that side's, pair by pair.",
        "",
        "| case | size | on | side | phase | seconds | ratio | peak RSS MiB | peak RssAnon MiB"
        " | peak RSS / final | PSS MiB | further |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    targets = {row["title"]: row["target"] for row in rows}
    foot = [
        "",
        "Measured on:",
        "",
        *(f"- {mark}: {_conditions(row)}" for mark, row in marks.values()),
        "",
        "Targets:",
        "",
        *(f"- {title}: {target}" for title, target in targets.items()),
    ]
    table = [cells for row in rows for cells in _rows(row, marks[_under(row)][0])]
    return "\n".join([*head, *table, *foot]) + "\n"


def _marks(rows: list[Row]) -> dict[str, tuple[str, Row]]:
    """Give each stack and the conditions it was measured under a mark: ``modern``, ``modern 2``."""
    marks: dict[str, tuple[str, Row]] = {}
    for row in rows:
        if _under(row) not in marks:
            stack = row["stack"]
            number = 1 + sum(other["stack"] == stack for _, other in marks.values())
            marks[_under(row)] = (stack if number == 1 else f"{stack} {number}", row)
    return marks


def _under(row: Row) -> str:
    return f"{row['stack']} {row['under']}"


def _conditions(row: Row) -> str:
    under = row["under"]
    versions = ", ".join(f"{name} {version}" for name, version in under["versions"].items())
    remark = f"{under['remark']}; " if "remark" in under else ""
    return f"{under['date']}; {under['machine']}; {remark}{under['threads']} threads; {versions}"


def _rows(row: Row, mark: str) -> Iterator[str]:
    for name, side in row["sides"].items():
        for number, phase in enumerate(side["phases"]):
            first = number == 0
            share = phase["peak_rss_mib"]["median"] / row["final_mib"] if row["final_mib"] else None
            cells = (
                row["title"],
                row["size"],
                mark,
                name,
                phase["name"],
                _range(phase["seconds"]),
                _range(side["ratio"]) if first and side["ratio"] else "",
                _range(phase["peak_rss_mib"]),
                _range(phase["peak_anon_mib"]),
                "" if share is None else f"{share:.3f}",
                _pss(phase),
                "; ".join(f"{key} {_range(value)}" for key, value in phase["figures"].items()),
            )
            yield f"| {' | '.join(cells)} |"


def _pss(phase: Row) -> str:
    if not phase.get("pss_mib"):
        return ""
    before = phase.get("pss_before_mib")
    return f"{phase['pss_mib']:.0f}" + (f" (before: {before:.0f})" if before else "")


def _range(summary: dict[str, Any]) -> str:
    values = (summary["median"], summary["low"], summary["high"])
    middle, low, high = (f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}" for value in values)
    return f"{middle} ({low}-{high})"
