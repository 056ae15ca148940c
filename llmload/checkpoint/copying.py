"""Copies that are made by other threads while the engine goes on to the next weight."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

_MOST_THREADS = 4
"""As many as transformers reads with; a cast is bound by memory, not by cores."""

_SMALL = 2**18
"""Bytes below which handing a copy to a thread takes longer than making it."""


class Copies(AbstractContextManager["Copies"]):
    """Does jobs in other threads, no more of them at a time than there are threads.

    What a job raises is raised by the next :meth:`add` or by :meth:`finish`, in the order of the
    jobs. At the end of the ``with`` block no thread is left, whatever happened: jobs that have not
    begun are dropped.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._threads = min(_MOST_THREADS, cores())
        self._running: deque[Future[None]] = deque()

    def __exit__(self, *exc: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        self._running.clear()  # and what errors of theirs hold

    def add(self, job: Callable[[], None], nbytes: int) -> None:
        """Do ``job``, which writes ``nbytes``: at once where they are few, else in a thread.

        Waits while every thread is busy, so that what jobs hold in memory stays bounded.
        """
        if nbytes < _SMALL:
            job()
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, "llmload-copy")
        while len(self._running) > self._threads:
            self._running.popleft().result()
        self._running.append(self._pool.submit(job))

    def finish(self) -> None:
        """Wait for all jobs."""
        while self._running:
            self._running.popleft().result()


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
