"""Signs of life of ranks that plan a load and have not met the others yet.

A rank that is killed or stopped while it plans would leave the others waiting for as long as a
process group is waited for, and without its name. So each rank shows that it lives from the moment
its load begins, and says so too where its load is none that the others wait for.

Imported lazily, by functions: this module needs torch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from llmload.ranks.notices import POLL, Notices, own_client

SILENCE = 0.7
"""Share of the deadline after which silence counts as failure; the rest is for telling."""
_PLANNING, _ELSEWHERE = "llmload/planning", "llmload/elsewhere"


class Presence:
    """Shows the other ranks that this one lives, until it meets them or fails.

    Nothing of it can fail a load or hold it up: a thread does all of it, and gives up in silence.

    :param elsewhere: what this rank's load lacks, for the others' message, where it is none that
        they wait for; empty where it is.
    """

    def __init__(self, rank: int, elsewhere: str = "") -> None:
        self._rank = rank
        self._elsewhere = elsewhere
        self._stopped = threading.Event()
        self._kept: Any = None
        self._thread = threading.Thread(target=self._show, name="llmload-presence", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Show nothing more."""
        self._stopped.set()
        self._thread.join(3 * POLL)  # it may still look for the store

    def _show(self) -> None:
        with suppress(dist.DistError, RuntimeError, ValueError):
            # Of rank 0 it may be the store itself, which ends with the object.
            self._kept = _joined()
            store = own_client(self._kept, 60.0)
            store.set(f"{_ELSEWHERE}/{self._rank}", self._elsewhere)
            while not self._elsewhere:
                store.add(f"{_PLANNING}/{self._rank}", 1)
                if self._stopped.wait(POLL):
                    return


def _joined() -> Any:
    if dist.is_initialized():
        return distributed_c10d._get_default_store()
    return next(rendezvous("env://", timeout=timedelta(seconds=60)))[0]


class Presences:
    """What one rank sees of the others' signs of life."""

    def __init__(self, notices: Notices, deadline: float) -> None:
        self._store = notices.base
        self._patience = deadline * SILENCE
        self._seen: dict[int, tuple[int, float]] = {}

    def beats(self, rank: int) -> int:
        """Return how often a rank has shown that it lives; 0 where it has not begun."""
        return int(self._store.add(f"{_PLANNING}/{rank}", 0))

    def lost(self, ranks: Iterable[int]) -> str | None:
        """Return why one of some ranks will not come, as far as is known."""
        now = time.monotonic()
        for rank in ranks:
            key = f"{_ELSEWHERE}/{rank}"
            # `get` of a key that is not there would wait for it.
            if not self._store.check([key]):
                continue  # it starts
            elsewhere = self._store.get(key).decode()
            beats = -1 if elsewhere else self.beats(rank)
            before, since = self._seen.setdefault(rank, (beats, now))
            if before != beats:
                self._seen[rank] = beats, now
            elif now - since > self._patience:
                if elsewhere:
                    return f"rank {rank} loads something else: its spec is without `{elsewhere}`"
                return (
                    f"rank {rank} gave no sign of life for {self._patience:g} s while it planned:"
                    " it ended or hangs"
                )
        return None
