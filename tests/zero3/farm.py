"""Runs functions on several ranks, forked from one process that has imported everything once.

``launch`` starts that process, which takes ten seconds; every group of ranks after it is a fork and
takes none. Run as a script, this module is that process: jobs come as JSON on stdin, outcomes go to
a file.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

TESTS = Path(__file__).parent.parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # torch's store looks up the name of every address that connects, at the server too. A name
    # server that does not answer would hold it up for 5 seconds, longer than a test's deadline.
    "RES_OPTIONS": "timeout:1 attempts:1",
}


@dataclass
class Job:
    """A function to be called on every rank of a new process group."""

    call: str
    """``module:function``, found from ``tests``; takes ``args`` and returns JSON-able data."""
    args: dict[str, Any] = field(default_factory=dict)
    ranks: int = 2
    timeout: float = 60.0
    """Seconds after which ranks that still run are killed."""
    refused_late: bool = False
    """Whether a load may be refused though its plan had no error."""


@dataclass
class Outcome:
    """How a job ended on one rank."""

    code: int
    """Exit code; negative for a signal, and -9 also for a rank that had to be killed."""
    seconds: float
    """From the fork to the end."""
    result: Any
    """What the function returned."""
    output: str
    """stdout and stderr together."""


def launch(jobs: Sequence[Job], *, timeout: float, at_once: int = 1) -> list[list[Outcome]]:
    """Run jobs, so many at once; returns the outcomes of each job, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "outcomes.json")
        farm = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", __file__, str(answer), str(at_once)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )
        try:
            output, _ = farm.communicate(json.dumps([asdict(job) for job in jobs]), timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(farm.pid, signal.SIGKILL)
        assert answer.exists(), output
        return [[Outcome(**rank) for rank in job] for job in json.loads(answer.read_text())]


def launch_once(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    make: Callable[[], Mapping[Any, Job]],
    *,
    timeout: float,
    at_once: int = 1,
) -> dict[Any, list[Outcome]]:
    """Run jobs for all tests of a module, whichever processes of pytest-xdist they are in.

    :param name: of the module; the outcomes are kept under it.
    :param make: called in the one process that runs the jobs.
    """
    from once import once  # not where this module is the script

    def run() -> dict[Any, list[Outcome]]:
        jobs = make()
        found = launch(list(jobs.values()), timeout=timeout, at_once=at_once)
        return dict(zip(jobs, found, strict=True))

    return once(tmp_path_factory, name, run)


def main() -> None:
    sys.path.insert(0, str(TESTS))
    jobs = [Job(**job) for job in json.load(sys.stdin)]
    for name in ("deepspeed", "transformers", "peft", "llmload.loading.pipeline", "late"):
        importlib.import_module(name)
    for job in jobs:
        importlib.import_module(job.call.partition(":")[0])
    # Compiled here, if it must be: a rank that is killed meanwhile would leave a lock behind, on
    # which every later run waits for good.
    importlib.import_module("deepspeed.comm.torch").build_shm_op()
    importlib.import_module("llmload.host.registry").create_registry()  # imports every plugin
    gc.collect()
    gc.freeze()  # nothing of this is garbage later: ranks that search for some do it in no time
    outcomes = [[asdict(outcome) for outcome in job] for job in _all(jobs, int(sys.argv[2]))]
    Path(sys.argv[1]).write_text(json.dumps(outcomes))


def _all(jobs: Sequence[Job], at_once: int) -> list[list[Outcome]]:
    """Run the jobs in order; a new one starts when one of ``at_once`` has ended."""
    running: dict[int, Running] = {}
    outcomes: dict[int, list[Outcome]] = {}
    waiting = list(enumerate(jobs))
    while waiting or running:
        while waiting and len(running) < at_once:
            number, job = waiting.pop(0)
            running[number] = Running(job)
        for number, job in list(running.items()):
            if job.ended():
                outcomes[number] = running.pop(number).outcomes()
        time.sleep(0.01)
    return [outcomes[number] for number in range(len(jobs))]


class Running:
    """The forked ranks of one job."""

    def __init__(self, job: Job) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._job = job
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, f"{rank}") for rank in range(job.ranks)]
        self._started = time.monotonic()
        self._ranks = {_fork(job, r, port, self._files[r]): r for r in range(job.ranks)}
        self._ends: dict[int, tuple[int, float]] = {}

    def ended(self) -> bool:
        """Look after the ranks; whether all of them have ended."""
        for pid in list(self._ranks):
            done, status = os.waitpid(pid, os.WNOHANG)
            seconds = time.monotonic() - self._started
            if done:
                self._ends[self._ranks.pop(pid)] = (os.waitstatus_to_exitcode(status), seconds)
            elif seconds > self._job.timeout or all(map(_is_stopped, self._ranks)):
                os.kill(pid, signal.SIGKILL)
        return not self._ranks

    def outcomes(self) -> list[Outcome]:
        """Return how each rank ended."""
        with self._folder:
            return [
                Outcome(*self._ends[rank], _result(file), file.with_suffix(".out").read_text())
                for rank, file in enumerate(self._files)
            ]


def _is_stopped(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "T"


def _result(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else None


def _fork(job: Job, rank: int, port: int, file: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        output = os.open(file.with_suffix(".out"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        module, _, function = job.call.partition(":")
        call = getattr(importlib.import_module(module), function)
        if not job.refused_late:
            call = functools.partial(importlib.import_module("late").held, call)
        result = call(**job.args)
        file.write_text(json.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
