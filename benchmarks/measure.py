"""Timed runs, each in a fresh process, watched from outside.

On virtual machines freed memory goes back to the host, and touching it again can cost more than the
load itself: just before each run a child process touches as much memory as the run will need. Peaks
are read by this process from ``/proc`` while the other works, so that watching costs it nothing.
Linux only.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_MIB = 2**20
_POLL_SECONDS = 0.004
_DEADLINE_SECONDS = 600


@dataclass(frozen=True)
class Run:
    """One run of one side."""

    seconds: float
    """Wall time of the timed part, by the process itself; of the whole process for ``whole``."""
    peak_rss_mib: float
    """Peak resident set, clean mapped file pages included, above the process before the load."""
    peak_anon_mib: float
    """Peak anonymous memory above the process before the load."""


@dataclass(frozen=True)
class Summary:
    """Median and range of one figure over several runs."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        return cls(statistics.median(values), min(values), max(values))


def warm(mib: int) -> None:
    """Touch ``mib`` MiB in a child process, so that the host has the pages ready for the run."""
    code = f"b = bytearray({mib} * 2**20)\nfor i in range(0, len(b), 4096): b[i] = 1"
    subprocess.run([sys.executable, "-c", code], check=True)


def run_side(module: str, arguments: Sequence[str], *, threads: int) -> Run:
    """Run ``python -m module arguments``: it says ready, waits for a line, works, says seconds."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(threads),
    )
    assert process.stdin
    assert process.stdout
    try:
        ready = process.stdout.readline()
        if ready.strip() != "ready":
            raise RuntimeError(f"{module} {' '.join(arguments)} failed before its run: {ready!r}")
        before = _memory(process.pid)
        # 5 resets the peak of the resident set (Linux 4.0).
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")
        process.stdin.write("go\n")
        process.stdin.flush()
        peak_anon, answer = _watch(process)
        after = _memory(process.pid)
        process.stdin.write("done\n")
        process.stdin.flush()
        process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
    return Run(
        seconds=float(json.loads(answer)["seconds"]),
        peak_rss_mib=(after["VmHWM"] - before["VmRSS"]) / _MIB,
        peak_anon_mib=(max(peak_anon, after["RssAnon"]) - before["RssAnon"]) / _MIB,
    )


def run_whole(command: Sequence[str], *, threads: int) -> Run:
    """Run a command from start to exit; memory is its own, not above anything."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env=_environment(threads), stdout=subprocess.DEVNULL)
    peak_rss = peak_anon = 0
    while process.poll() is None:
        memory = _memory(process.pid)
        if not memory:
            break  # it ended between the poll and the reading
        peak_rss, peak_anon = max(peak_rss, memory["VmHWM"]), max(peak_anon, memory["RssAnon"])
        time.sleep(_POLL_SECONDS)
    if process.wait() != 0:
        raise RuntimeError(f"{' '.join(command)} failed")
    return Run(time.perf_counter() - start, peak_rss / _MIB, peak_anon / _MIB)


def _watch(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Poll the process's anonymous memory until it answers."""
    import select

    assert process.stdout
    peak, deadline = 0, time.monotonic() + _DEADLINE_SECONDS
    while time.monotonic() < deadline:
        if select.select([process.stdout], [], [], _POLL_SECONDS)[0]:
            answer = process.stdout.readline()
            if not answer:
                raise RuntimeError(f"process {process.args} died during its run")
            return peak, answer
        peak = max(peak, _memory(process.pid)["RssAnon"])
    raise RuntimeError(f"process {process.args} took longer than {_DEADLINE_SECONDS} s")


def _memory(pid: int) -> dict[str, int]:
    """Return the memory lines of ``/proc/PID/status`` in bytes; empty for a process that ended."""
    wanted = ("VmRSS", "VmHWM", "RssAnon")
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in wanted:
            found[key] = int(value.split()[0]) * 1024
    return found


def _environment(threads: int) -> dict[str, str]:
    import os

    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def as_json(runs: Sequence[Run]) -> list[dict[str, float]]:
    """Return runs as plain data."""
    return [asdict(run) for run in runs]
