"""Timed runs, each in fresh processes, watched from outside.

On virtual machines freed memory goes back to the host, and touching it again can cost more than the
load itself: just before each run a child process touches as much memory as the run will need. Peaks
are read by this process from ``/proc`` while the others work, so that watching costs them nothing.
Linux only.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

_MIB = 2**20
_POLL_SECONDS = 0.004
_PSS_POLL_SECONDS = 0.05
_DEADLINE_SECONDS = 600


@dataclass(frozen=True)
class Phase:
    """One phase of one run, all ranks together."""

    name: str
    seconds: float
    """Wall time, by the slowest rank's own clock; of the whole process for a script."""
    peak_rss_mib: float
    """The largest rank's peak resident set, clean mapped file pages included, above the process
    before its first phase; a script's in all."""
    peak_anon_mib: float
    """The largest rank's peak of anonymous memory, likewise."""
    pss_mib: float | None = None
    """Sum over the ranks of each one's peak proportional set size, in all."""
    pss_before_mib: float | None = None
    """The same sum before the first phase."""
    figures: dict[str, float] = field(default_factory=dict)
    """What the side measured itself, on rank 0."""


@dataclass(frozen=True)
class Run:
    """One run of one side."""

    phases: tuple[Phase, ...]
    touched_mib: float
    """Sum over the ranks of the peak memory that is no file's, in all: what the next run will touch
    first. Pages of files are in the page cache, and touching that much too would push them out."""


def warm(mib: float) -> None:
    """Touch ``mib`` MiB in a child process, so that the host has the pages ready for the run."""
    code = f"b = bytearray({int(mib)} * 2**20)\nfor i in range(0, len(b), 4096): b[i] = 1"
    subprocess.run([sys.executable, "-c", code], check=True)


def run_ranks(
    python: str, arguments: Sequence[str], *, ranks: int, threads: int, pss: bool = False
) -> Run:
    """Run ``benchmarks.side`` with ``arguments`` on every rank, phase by phase.

    :param threads: of all ranks together.
    :param pss: take the proportional set size, which slows the processes down.
    :raises RuntimeError: a rank failed or took too long; with the end of what it printed.
    """
    port = free_port()
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                _Rank(
                    [python, "-m", "benchmarks.side", *arguments],
                    environment(max(1, threads // ranks)) | of_rank(rank, ranks, port),
                )
            )
            for rank in range(ranks)
        ]
        _answers(processes, pss=False)  # all are ready
        for process in processes:
            process.before = process.memory() | ({"Pss": process.pss()} if pss else {})
        phases: list[Phase] = []
        touched = 0.0
        while True:
            for process in processes:
                process.begin()
            answers = _answers(processes, pss)
            if "end" in answers[0]:
                return Run(tuple(phases), touched)
            for process in processes:
                process.look()
            phases.append(_phase(processes, answers, pss))
            touched = max(touched, sum(p.touched for p in processes) / _MIB)


def run_script(python: str, code: str, *, threads: int) -> Run:
    """Run a script from start to exit; memory is its own, not above anything."""
    start = time.perf_counter()
    with _Rank([python, "-c", code], environment(threads)) as process:
        while process.popen.poll() is None:
            process.look()
            time.sleep(_POLL_SECONDS)
        seconds = time.perf_counter() - start
        if process.popen.returncode != 0:
            raise RuntimeError(f"a script failed: {code}\n{process.said()}")
    rss, anon = process.peak["VmHWM"] / _MIB, process.peak["RssAnon"] / _MIB
    return Run((Phase("whole process", seconds, rss, anon),), process.touched / _MIB)


class _Rank:
    """A process, its pipes and the peaks of its memory."""

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed on exit
        self.popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=env,
        )
        self.before = dict.fromkeys(_FIELDS, 0)
        self.peak = dict.fromkeys(_FIELDS, 0)
        self.peak_pss = 0

    def __enter__(self) -> _Rank:
        return self

    def __exit__(self, *exc: object) -> None:
        self.popen.kill()
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout, self._errors):
            assert pipe
            pipe.close()

    @property
    def answers(self) -> IO[str]:
        assert self.popen.stdout
        return self.popen.stdout

    @property
    def touched(self) -> int:
        """Peak bytes that are no file's."""
        return self.peak["RssAnon"] + self.peak["RssShmem"]

    def begin(self) -> None:
        """Let it do its next phase; peaks count from here."""
        # 5 resets the peak of the resident set (Linux 4.0).
        Path(f"/proc/{self.popen.pid}/clear_refs").write_text("5")
        self.peak, self.peak_pss = dict.fromkeys(_FIELDS, 0), 0
        assert self.popen.stdin
        self.popen.stdin.write("go\n")
        self.popen.stdin.flush()

    def look(self, pss: bool = False) -> None:
        """Bring the peaks up to date."""
        found = self.memory()
        self.peak = {name: max(peak, found.get(name, 0)) for name, peak in self.peak.items()}
        if pss:
            self.peak_pss = max(self.peak_pss, self.pss())

    def memory(self) -> dict[str, int]:
        """Return the memory lines of its status in bytes; none for a process that ended."""
        return _fields(Path(f"/proc/{self.popen.pid}/status"), _FIELDS)

    def pss(self) -> int:
        """Return its proportional set size in bytes; 0 for a process that ended."""
        return _fields(Path(f"/proc/{self.popen.pid}/smaps_rollup"), ("Pss",)).get("Pss", 0)

    def said(self) -> str:
        """Return the end of what it wrote to standard error."""
        self._errors.seek(0)
        return self._errors.read()[-4000:]


_FIELDS = ("VmRSS", "VmHWM", "RssAnon", "RssShmem")


def _fields(file: Path, wanted: Sequence[str]) -> dict[str, int]:
    found = {}
    for line in file.read_text().splitlines():
        key, _, value = line.partition(":")
        if key in wanted:
            found[key] = int(value.split()[0]) * 1024
    return found


def _answers(ranks: Sequence[_Rank], pss: bool) -> list[dict[str, Any]]:
    """Watch all ranks until each has answered."""
    deadline = time.monotonic() + _DEADLINE_SECONDS
    answers: dict[int, dict[str, Any]] = {}
    pause = _PSS_POLL_SECONDS if pss else _POLL_SECONDS
    with selectors.DefaultSelector() as selector:
        for number, rank in enumerate(ranks):
            selector.register(rank.answers, selectors.EVENT_READ, number)
        while len(answers) < len(ranks):
            for key, _ in selector.select(pause):
                selector.unregister(key.fileobj)
                line = ranks[key.data].answers.readline()
                if not line:
                    raise RuntimeError(f"rank {key.data} died:\n{ranks[key.data].said()}")
                answers[key.data] = json.loads(line)
            for rank in ranks:
                rank.look(pss)
            if time.monotonic() > deadline:
                waiting = sorted({*range(len(ranks))} - answers.keys())
                raise RuntimeError(
                    f"rank {waiting[0]} took longer than {_DEADLINE_SECONDS} s:\n"
                    f"{ranks[waiting[0]].said()}"
                )
    return [answers[number] for number in range(len(ranks))]


def _phase(ranks: Sequence[_Rank], answers: Sequence[dict[str, Any]], pss: bool) -> Phase:
    return Phase(
        name=answers[0]["phase"],
        seconds=max(answer["seconds"] for answer in answers),
        peak_rss_mib=max(r.peak["VmHWM"] - r.before["VmRSS"] for r in ranks) / _MIB,
        peak_anon_mib=max(r.peak["RssAnon"] - r.before["RssAnon"] for r in ranks) / _MIB,
        pss_mib=sum(r.peak_pss for r in ranks) / _MIB if pss else None,
        pss_before_mib=sum(r.before["Pss"] for r in ranks) / _MIB if pss else None,
        figures=answers[0]["figures"],
    )


def of_rank(rank: int, ranks: int, port: str) -> dict[str, str]:
    """Return the variables by which a launcher tells a process which rank it is."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a run: offline, no progress bars, so many threads."""
    # pip compiles what it installs, but for an editable install: its first, uncounted run does it.
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {
        **inherited,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
