"""Functions run in processes of their own: on the ranks of a process group, or apart from a test.

Processes are forked from one that has imported torch and transformers once, so that each takes a
fraction of a second. What cannot be pickled, such as a class made inside a test, is forked from the
test's own process instead.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

PRELOADED = ("torch", "transformers", "peft", "llmload.loading.pipeline", "llmload.testing.ranks")

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # torch's store looks up the name of every address that connects, at the server too. A name
    # server that does not answer would hold it up for 5 seconds.
    "RES_OPTIONS": "timeout:1 attempts:1",
}


class RanksFailedError(AssertionError):
    """A function failed, or did not end, on some of the ranks."""


@dataclass(frozen=True)
class Outcome:
    """How a function ended in one process."""

    value: Any
    """What it returned; None where it returned nothing."""
    error: str
    """The traceback of what it raised, or how the process ended; empty where it returned."""
    stdout: str
    """What it wrote to standard output."""
    stderr: str
    """What it wrote to standard error."""


def run_on_ranks(
    function: Callable[..., Any],
    *args: Any,
    ranks: int = 2,
    timeout: float = 120.0,
    process_group: bool = True,
) -> list[Any]:
    """Call ``function(*args)`` on every rank of a new gloo process group; return what each returns.

    The environment is that of ``torchrun --nproc_per_node RANKS``. What is returned must be
    picklable. From a script, call it under ``if __name__ == "__main__"``.

    :param timeout: seconds after which ranks that still run are killed.
    :param process_group: initialise torch.distributed before the call; without it the function, or
        a plugin as ``zero3`` does, has to.
    :raises RanksFailedError: the function raised, exited or did not end on some rank; the message
        has the traceback and the output of each.
    """
    found = outcomes(function, args, ranks=ranks, timeout=timeout, process_group=process_group)
    failed = {rank: outcome for rank, outcome in enumerate(found) if outcome.error}
    if failed:
        told = "\n".join(
            f"--- rank {rank} of {ranks}\n{outcome.error}\n{outcome.stdout}{outcome.stderr}"
            for rank, outcome in failed.items()
        )
        raise RanksFailedError(f"{function.__qualname__} failed on {len(failed)} rank(s)\n{told}")
    return [outcome.value for outcome in found]


def outcomes(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    ranks: int,
    timeout: float,
    process_group: bool,
) -> list[Outcome]:
    """Call a function on every rank, and return how it ended on each."""
    with tempfile.TemporaryDirectory() as place:
        port = _free_port()
        launched = [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            for rank in range(ranks)
        ]
        files = [Path(place, str(rank)) for rank in range(ranks)]
        calls = [
            (
                function,
                args,
                dict(os.environ) | ENVIRONMENT | launched[rank],
                files[rank],
                process_group,
            )
            for rank in range(ranks)
        ]
        context = _context(calls[0])
        processes = [context.Process(target=_call, args=call, daemon=True) for call in calls]
        with warnings.catch_warnings():
            # Python 3.12 warns of forking where there are threads; there is no other way for what
            # cannot be pickled.
            warnings.simplefilter("ignore", DeprecationWarning)
            for process in processes:
                process.start()
        until = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
        return [
            _outcome(process, file, timeout) for process, file in zip(processes, files, strict=True)
        ]


def _context(call: tuple[Any, ...]) -> Any:
    try:
        pickle.dumps(call)
    except (pickle.PicklingError, AttributeError, TypeError):
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    # The process that forks imports these once, and what started this one: every child asks for it.
    context.set_forkserver_preload([*PRELOADED, *({"pytest"} & sys.modules.keys())])
    return context


def _outcome(process: Any, file: Path, timeout: float) -> Outcome:
    alive = process.is_alive()
    if alive:
        process.kill()
        process.join()
    out, err = (_text(file.with_suffix(suffix)) for suffix in (".out", ".err"))
    result = file.with_suffix(".pickle")
    if alive:
        return Outcome(None, f"it did not end within {timeout:g} s", out, err)
    if not result.exists():
        return Outcome(None, f"its process ended with exit code {process.exitcode}", out, err)
    value, error = pickle.loads(result.read_bytes())
    return Outcome(value, error, out, err)


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _call(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    environment: dict[str, str],
    file: Path,
    process_group: bool,
) -> NoReturn:
    """Be one rank: call, write down how it ended, and end without anybody's exit handlers."""
    for number, suffix in ((1, ".out"), (2, ".err")):
        sink = os.open(file.with_suffix(suffix), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(sink, number)
        os.close(sink)
    # pytest may have put its own in their place, where this process was forked from it.
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    # So that locks of libraries need no name, which this process would leave behind.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.clear()
    os.environ.update(environment)
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        if process_group:
            dist.init_process_group("gloo")
            dist.barrier()  # a rank that ended now would close connections that others still make
        ended = pickle.dumps((function(*args), ""))
    except BaseException:  # an exit too is how a function ends
        ended = pickle.dumps((None, traceback.format_exc()))
    file.with_suffix(".pickle").write_bytes(ended)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
