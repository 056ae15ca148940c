"""Run the comparisons side by side and write table and plots: ``python -m benchmarks --help``."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from llmload.versions import installed_versions

from . import show
from .cases import CASES, WHOLE
from .folders import SIZES, folder
from .measure import Run, Summary, as_json, run_side, run_whole, warm

_SIDES = ("llmload", "peer")


def main(
    case: Annotated[
        list[str] | None, typer.Option(help="Case to run; by default every one.")
    ] = None,
    size: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SIZES)}.")] = None,
    pairs: Annotated[int, typer.Option(help="Alternating pairs of runs.")] = 5,
    threads: Annotated[int, typer.Option(help="OMP_NUM_THREADS of each run.")] = 2,
    work: Annotated[Path, typer.Option(help="Where checkpoint folders are kept.")] = Path("build"),
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("benchmarks/results"),
) -> None:
    """Compare llmload with its peers, alternating, each run in its own process."""
    rows = []
    for name in case or [*CASES, *WHOLE]:
        for asked in size or ["0.1B", "1.1B"]:
            if name in WHOLE:
                rows.append(_whole(name, asked, pairs, threads, work))
            else:
                rows.append(_sides(name, asked, pairs, threads, work))
            print(show.line(rows[-1]), file=sys.stderr)
    results = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB,"
        f" {platform.machine()}, no accelerator",
        "threads": threads,
        "versions": installed_versions(),
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "loading.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "loading.md").write_text(show.table(results))
    show.plot(results, out / "loading")


def _sides(name: str, size: str, pairs: int, threads: int, work: Path) -> dict[str, Any]:
    case = CASES[name]
    made = folder(work, size, case.stored)
    stored = sum(file.stat().st_size for file in made.glob("*.safetensors")) / 2**20
    widths = {"float32": 4, "bfloat16": 2}
    if isinstance(case.final, str):
        final = stored * widths[case.final] / widths[case.stored]
    else:
        final = case.final(made)

    def run(side: str) -> Run:
        warm(int(final + stored) + 256)
        return run_side("benchmarks.side", [name, side, str(made)], threads=threads)

    return _row(name, case.title, size, case.peer_name, case.target, final, pairs, run)


def _whole(name: str, size: str, pairs: int, threads: int, work: Path) -> dict[str, Any]:
    made = folder(work, size, "bfloat16")
    scripts = dict(zip(_SIDES, WHOLE[name], strict=True))
    final = sum(file.stat().st_size for file in made.glob("*.safetensors")) / 2**20

    def run(side: str) -> Run:
        warm(int(final) + 512)
        code = scripts[side].format(folder=str(made))
        return run_whole([sys.executable, "-c", code], threads=threads)

    title = "import to loaded model, whole process"
    return _row(name, title, size, "plain script", "never slower", final, pairs, run)


def _row(
    name: str, title: str, size: str, peer: str, target: str, final: float, pairs: int, run: Any
) -> dict[str, Any]:
    runs: dict[str, list[Run]] = {side: [] for side in _SIDES}
    for side in _SIDES:
        run(side)  # fills the page cache; not counted
    for _ in range(pairs):
        for side in _SIDES:
            runs[side].append(run(side))
    ratios = [a.seconds / b.seconds for a, b in zip(runs["llmload"], runs["peer"], strict=True)]
    figures = ("seconds", "peak_rss_mib", "peak_anon_mib")
    return {
        "case": name,
        "title": title,
        "size": size,
        "peer_name": peer,
        "target": target,
        "final_mib": final,
        "time_ratio": asdict(Summary.of(ratios)),
        **{
            side: {f: asdict(Summary.of([getattr(r, f) for r in runs[side]])) for f in figures}
            for side in _SIDES
        },
        "runs": {side: as_json(runs[side]) for side in _SIDES},
    }


if __name__ == "__main__":
    typer.run(main)
