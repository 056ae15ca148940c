"""One comparison: its sides alternate, and what they took becomes a row of the results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .case import OURS, Case
from .measure import Phase, Run, run_ranks, run_script, warm

Row = dict[str, Any]

_SPARE_MIB = 256


def compare(
    topic: str,
    name: str,
    case: Case,
    size: str,
    stack: str,
    python: str,
    *,
    pairs: int,
    threads: int,
    work: Path,
) -> Row:
    """Run every side ``pairs`` times, alternating; return the row."""
    made = case.checkpoint(work, size)
    touched: dict[str, float] = {}
    runs: dict[str, list[Run]] = {side: [] for side in case.sides}
    final = case.final(made)

    def run(side: str, *, pss: bool = False) -> Run:
        warm(touched.get(side, final * 2) + _SPARE_MIB)
        script = case.sides[side]
        if isinstance(script, str):
            return run_script(python, script.format(folder=str(made)), threads=threads)
        with case.around(made) as seen:
            arguments = [topic, name, side, str(seen)]
            return run_ranks(python, arguments, ranks=case.ranks, threads=threads, pss=pss)

    for side in case.sides:  # fills the page cache and tells how much memory it takes; not counted
        touched[side] = run(side).touched_mib
    for _ in range(pairs):
        for side in case.sides:
            runs[side].append(run(side))
    row = {
        "case": name,
        "title": case.title,
        "size": size,
        "stack": stack,
        "ranks": case.ranks,
        "target": case.target,
        "final_mib": final,
        "sides": {side: _side(of, runs[OURS]) for side, of in runs.items()},
    }
    if case.pss or case.ranks > 1:
        for side in case.sides:
            for told, phase in zip(
                row["sides"][side]["phases"], run(side, pss=True).phases, strict=True
            ):
                told["pss_mib"] = phase.pss_mib
                told["pss_before_mib"] = phase.pss_before_mib
    return row


def _side(runs: Sequence[Run], ours: Sequence[Run]) -> Row:
    """Summarise a side's runs phase by phase, with our time over its time, pair by pair."""
    return {
        "phases": [_phase(phases) for phases in zip(*(run.phases for run in runs), strict=True)],
        "ratio": None
        if runs is ours
        else summary(
            [a.phases[0].seconds / b.phases[0].seconds for a, b in zip(ours, runs, strict=True)]
        ),
    }


def _phase(phases: Sequence[Phase]) -> Row:
    measured = {
        figure: [asdict(phase)[figure] for phase in phases]
        for figure in ("seconds", "peak_rss_mib", "peak_anon_mib")
    }
    return {
        "name": phases[0].name,
        **{figure: summary(values) for figure, values in measured.items()},
        "figures": {
            name: summary([phase.figures[name] for phase in phases]) for name in phases[0].figures
        },
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Return median and range of a figure, and its values in the order of the runs."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "runs": list(values),
    }
