"""How long every hostile folder is looked at, and how much memory that takes above the process.

Run as a script on each stack, it loads each folder of the corpus, and each that has one strange
value (``values.py``), in a process of its own that may take ten seconds of a processor and four
GiB more than it has, keeps what was measured in ``limits.json`` and writes the table in
SECURITY.md. Seconds are those of the processor, which other programs do not lengthen but where
memory is short: what took more than one is measured again, and the lesser of both counts.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "hostile")]

import values  # noqa: E402
from corpus import Row, rows  # noqa: E402
from published import SECURITY, STACK, attempt, make_sound, published  # noqa: E402

import llmload  # noqa: E402

KEPT = Path(__file__).with_name("limits.json")
BEGIN, END = "<!-- limits: python tests/hostile/limits.py -->\n", "<!-- end of limits -->\n"
SECONDS, BYTES = 10, 4 << 30
REPEATED = 1.0
"""Seconds of the processor above which a row is measured a second time."""


def main() -> None:
    """Measure all rows on this stack, and write down the worst."""
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        sound = make_sound(place)
        others = values.model_types(place)
        for folder in others.values():
            llmload.load({"model": str(folder)})
        llmload.load({"model": str(sound), "lora": {"r": 2}})  # what is imported is imported
        gc.freeze()
        before = _child(lambda: ("", []), place)["memory"]
        corpus = chain(rows(), (one.row._replace(name=one.names) for one in published()))
        measured[STACK] = _worst([_measured(row, sound, before) for row in corpus])
        strange = [
            _measured(row, folder, before)
            for folder in (sound, *others.values())
            for row in values.rows(folder)
        ]
        measured[f"{STACK}, one strange value"] = _worst(strange)
    kept = {**(json.loads(KEPT.read_text()) if KEPT.exists() else {}), **measured}
    KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    before_, _, rest = SECURITY.read_text().partition(BEGIN)
    SECURITY.write_text(before_ + BEGIN + table(kept) + END + rest.partition(END)[2])


def _measured(row: Row, sound: Path, before: int) -> dict[str, Any]:
    """Load what the row makes of the folder; ``memory`` is what that took above the process's."""
    measured = _once(row, sound)
    if measured["seconds"] > REPEATED:
        measured = min(measured, _once(row, sound), key=lambda each: float(each["seconds"]))
    return {**measured, "row": row.name, "memory": measured["memory"] - before}


def _once(row: Row, sound: Path) -> dict[str, Any]:
    folder = sound.with_name("case") / "model"
    shutil.copytree(sound, folder)
    measured = _child(lambda: attempt(row, folder), folder.parent)
    shutil.rmtree(folder.parent)
    return measured


def _child(what: Any, place: Path) -> dict[str, Any]:
    """Do it in a process of its own, within the limits; ``outcome`` says how it ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.chdir(place)
        said = _within_limits(what)
        os.write(writing, json.dumps(said).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        text = answer.read()
    _, _, used = os.wait4(child, 0)
    said = json.loads(text) if text else {"outcome": "hung or died", "seconds": SECONDS}
    return {**said, "memory": used.ru_maxrss * 1024}


def _within_limits(what: Any) -> dict[str, Any]:
    here = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (here + BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS,) * 2)
    began = time.process_time()
    try:
        refusal, done = what()
        outcome = "refused" if refusal else "no harm"
        if done:
            outcome = f"harm: {done}"
    except BaseException as error:
        outcome = f"a traceback: {type(error).__name__}"
    return {"outcome": outcome, "seconds": time.process_time() - began}


def _worst(found: list[dict[str, Any]]) -> dict[str, Any]:
    counts = dict.fromkeys(("refused", "no harm"), 0)
    for one in found:
        counts[one["outcome"]] = counts.get(one["outcome"], 0) + 1
    slowest = max(found, key=lambda one: one["seconds"])
    largest = max(found, key=lambda one: one["memory"])
    return {
        "folders": len(found),
        "outcomes": counts,
        "slowest": [round(slowest["seconds"], 2), slowest["row"]],
        "largest": [largest["memory"] >> 20, largest["row"]],
    }


def table(kept: dict[str, Any]) -> str:
    """Return the table of SECURITY.md."""
    lines = ["| stack | folders | ended | slowest | most memory |", "|---|---|---|---|---|"]
    for stack, found in sorted(kept.items(), reverse=True):
        ended = ", ".join(f"{count} {outcome}" for outcome, count in found["outcomes"].items())
        seconds, mib = f"{found['slowest'][0]:.2f} s", f"{found['largest'][0]} MiB"
        lines.append(
            f"| {stack} | {found['folders']} | {ended} | {seconds} ({found['slowest'][1]})"
            f" | {mib} ({found['largest'][1]}) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
