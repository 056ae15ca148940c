"""A topic's results on disk: a rerun replaces the rows that it measured and keeps the others."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import psutil

from . import plot, show
from .case import cases, title
from .compare import Row
from .folders import SIZES


def conditions(python: str, threads: int, remark: str = "") -> dict[str, Any]:
    """Return what a row was measured under: it differs from row to row where some were rerun."""
    code = "import json, llmload.host.distributions as v; print(json.dumps(v.installed_versions()))"
    answer = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    memory = psutil.virtual_memory().total / 2**30
    return {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.machine()},"
        " no accelerator",
        "threads": threads,
        "versions": json.loads(answer.stdout),
        **({"remark": remark} if remark else {}),
    }


def add(out: Path, topic: str, row: Row, under: dict[str, Any]) -> None:
    """Put a row into ``topic.json`` in ``out``; write table and plots anew."""
    file = out / f"{topic}.json"
    rows: list[Row] = json.loads(file.read_text())["rows"] if file.exists() else []
    known = list(cases(topic))
    rows = [old for old in rows if _key(old) != _key(row) and old["case"] in known]
    rows.append(row | {"under": under})
    stacks = sorted({each["stack"] for each in rows}, key=lambda stack: (stack != "modern", stack))
    rows.sort(
        key=lambda each: (
            known.index(each["case"]),
            stacks.index(each["stack"]),
            list(SIZES).index(each["size"]),
        )
    )
    results = {"title": title(topic), "rows": rows}
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    (out / f"{topic}.md").write_text(show.page(results))
    plot.draw(results, out / topic)


def _key(row: Row) -> tuple[str, str, str]:
    return row["case"], row["size"], row["stack"]
