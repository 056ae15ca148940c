"""The ranks of one load: they agree, they go on together, or they all stop and say why.

A rank that fails alone leaves the others in a collective that never ends. So every rank of a load
writes to the key-value store of the process group, which no collective can block: signs of life,
failures, and where it has come. A thread looks after it: each rank watches the next one, and all
watch for failures. Whoever waits at a meeting point stops with the failed rank's name and reason.
A process that does not come to such a point, because it is stuck in a collective that nothing can
interrupt, writes the reason to stderr and ends with exit code 1.

Imported lazily, by functions: this module needs torch.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from llmload.errors import LoadFailedError, RequestError
from llmload.ranks.launcher import reason
from llmload.ranks.notices import POLL, Notices, store_is_gone
from llmload.ranks.presence import SILENCE, Presences

# Shares of the deadline, beside that until silence counts as failure: from a failure until the load
# is interrupted, which may be busy in a plugin, and from then until the process is ended, which may
# be stuck in a collective. What is left over is for the polling in between.
_POLITE, _GRACE = 0.08, 0.12
_LINGER = 0.25
"""Share of it in which those that wait learn of a failure before the store may end."""

_T = TypeVar("_T")


class Ranks(AbstractContextManager["Ranks"]):
    """The ranks of one load, or of the loads of one group, until all of it has ended on all ranks.

    Leaving the ``with`` block is a meeting point too: either all ranks leave it well, or all raise.

    :param deadline: seconds within which a rank that failed, ended or hangs stops all others.
    :param lacking: the section without which a rank's load is not this one, for a message.
    """

    def __init__(self, deadline: float, *, lacking: str) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._deadline = deadline
        self._lacking = lacking
        store = distributed_c10d._get_default_store()
        self._notices = Notices(store, self.rank, self.size, deadline * SILENCE)
        self._presences = Presences(self._notices, deadline)
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._leaving = False
        self._store = self._notices.store
        self._failure: str | None = None
        self._load = 0
        self._noticed = threading.Event()
        self._stopped = threading.Event()
        self._store_answers = True
        self._pulse = time.monotonic()
        self._threads = [
            threading.Thread(target=work, name="llmload-ranks", daemon=True)
            for work in (self._watch, self._guard)
        ]

    def __enter__(self) -> Ranks:
        self._asked(lambda: self._store.add(f"alive/{self.rank}", 1))
        for thread in self._threads:
            thread.start()
        return self

    def agree(self, request: Mapping[str, str]) -> None:
        """Compare what this rank is about to load with what rank 0 is.

        :param request: what must be the same on all ranks, by names that a message can show.
        :raises RequestError: it differs from rank 0's.
        :raises LoadFailedError: another rank's differs, or it failed, ended or hangs.
        """
        self._load += 1
        key = f"request/{self._load}"
        if self.rank == 0:
            self._store.set(key, json.dumps(request))
        self._wait_until(lambda: self._store.check([key]))
        theirs: dict[str, str] = json.loads(self._store.get(key))
        differing = [
            f"{name} is {request.get(name, 'absent')} here and {theirs.get(name, 'absent')} there"
            for name in sorted(request.keys() | theirs.keys())
            if request.get(name) != theirs.get(name)
        ]
        if differing:
            raise RequestError(
                f"rank {self.rank} was asked for another load than rank 0: {'; '.join(differing)}",
                fix="Give every rank the same spec, plugins, versions and model folder.",
            )
        self.meet("agreed")

    def meet(self, point: str) -> None:
        """Wait until every rank has come to this point of the load that was agreed on last.

        :raises LoadFailedError: one of them failed, ended or hangs.
        """
        key = f"{point}/{self._load}"
        self._asked(lambda: self._store.add(key, 1))
        # `add` of 0 reads without waiting; `wait` and `get` would block until the key is there.
        self._wait_until(lambda: self._store.add(key, 0) >= self.size)

    def look(self) -> None:
        """Raise ``LoadFailedError`` if another rank has failed; for loops that take long."""
        if self._failure is not None:
            raise LoadFailedError(self._failure)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            with self._lock:
                self._leaving = True  # from here on it stops by itself
            self._part(error)
        except _Interrupted:  # it was on its way already
            raise LoadFailedError(self._failure or "another rank failed") from error
        finally:
            self._stopped.set()
            self._noticed.set()  # the guard looks at once whether there is anything left to guard
            if self._store_answers:
                for thread in self._threads:
                    thread.join()
                if self._failure is not None:
                    with suppress(dist.DistError):
                        self._notices.linger(self._deadline * _LINGER)

    def _part(self, error: BaseException | None) -> None:
        """Leave with the others, or with an error that all of them learn of."""
        if error is None:
            self._leave()
            return
        if isinstance(error, _Interrupted) or _is_of_a_collective(error):
            # It broke because another rank did: the watcher will know which.
            self._noticed.wait(self._deadline)
        if self._failure is not None:
            raise LoadFailedError(self._failure) from error
        self._notices.announce(self.rank, reason(error))
        self._failure = "this rank failed"

    def _leave(self) -> None:
        """Meet for the last time, rank 0 last of all: the store may end with its process."""
        self.meet("left")
        if self.rank:
            self._asked(lambda: self._store.add("gone", 1))
            return
        self._wait_until(lambda: self._store.add("gone", 0) >= self.size - 1)

    def _wait_until(self, so: Callable[[], bool]) -> None:
        """Ask the store until it is so; seldom once the others are not about to come."""
        pause = POLL / 200
        while not self._asked(so):
            time.sleep(pause)
            self.look()
            pause = min(2 * pause, POLL / 10)

    def _asked(self, question: Callable[[], _T]) -> _T:
        """Ask the store; raise where it is gone."""
        try:
            return question()
        except dist.DistError as error:
            self._failure = self._failure or store_is_gone(error)
            raise LoadFailedError(self._failure) from error

    # --- two threads --------------------------------------------------------------------------

    def _watch(self) -> None:
        """Show that this rank lives, and look whether the others do, until the load has ended."""
        try:
            failure = self._watched()
        except dist.DistError as error:
            failure = store_is_gone(error)
        if failure is not None:
            self._notice(failure)

    def _notice(self, failure: str) -> None:
        self._failure = failure
        self._noticed.set()

    def _watched(self) -> str | None:
        """Return the failure that was found; None when the load has ended."""
        # One watcher for each rank: the store is asked as often as there are ranks, not their
        # square.
        beside = (self.rank + 1) % self.size
        beats, since = 0, time.monotonic()
        while not self._stopped.wait(POLL):
            self._store.add(f"alive/{self.rank}", 1)
            failure = self._notices.failure()
            if failure is not None:
                return failure
            # One that plans and has not come yet lives too.
            now = self._store.add(f"alive/{beside}", 0) + self._presences.beats(beside)
            self._pulse = time.monotonic()
            if now != beats:
                beats, since = now, self._pulse
            elif self._pulse - since > self._deadline * SILENCE:
                self._notices.announce(beside, self._silence(beats))
        return None

    def _guard(self) -> None:
        """End the process where nothing else can: it is stuck although a rank has failed.

        Where the process that keeps the store is stopped, questions to it block for good too.
        """
        while not self._noticed.wait(POLL):
            if self._stopped.is_set():
                return
            if time.monotonic() - self._pulse > self._deadline * SILENCE:
                self._store_answers = False
                self._notice(store_is_gone(TimeoutError("it does not answer")))
        # Most loads come to a meeting point by themselves. One that is busy in Python is
        # interrupted, one that is stuck in C can only be ended.
        if self._stopped.wait(self._deadline * _POLITE):
            return
        with self._lock:
            if not self._leaving:
                _interrupt(self._thread)
        if not self._stopped.wait(self._deadline * _GRACE):
            print(f"llmload: rank {self.rank} stops: {self._failure}", file=sys.stderr, flush=True)  # noqa: T201
            os._exit(1)

    def _silence(self, beats: int) -> str:
        seconds = f"{self._deadline * SILENCE:g} s"
        if beats:
            return f"it gave no sign of life for {seconds}: it ended or hangs"
        return (
            f"it did not come to this load within {seconds}: it ended, hangs, failed earlier or"
            f" was given a spec without `{self._lacking}`"
        )


class _Interrupted(BaseException):
    """Raised in a thread that is busy while another rank has failed: no plugin catches it."""


def _interrupt(thread: int) -> None:
    """Raise ``_Interrupted`` in a thread as soon as it runs Python again."""
    # As the interpreter's own tests do; https://docs.python.org/3/c-api/init.html
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(_Interrupted)
    )


def _is_of_a_collective(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, came from talking to another rank."""
    while error is not None:
        if isinstance(error, dist.DistError):
            return True
        if isinstance(error, RuntimeError) and any(
            word in str(error) for word in ("gloo", "NCCL", "Connection closed", "Connection reset")
        ):
            return True
        error = error.__cause__
    return False
