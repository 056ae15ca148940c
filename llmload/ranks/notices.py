"""What the ranks of one load tell each other, in the store that no collective can block.

Imported lazily, by functions: this module needs torch.
"""

from __future__ import annotations

import json
import os
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from llmload.errors import LoadFailedError

POLL = 0.1
"""Seconds between two looks at the store, or at the other thread."""


class Notices:
    """The part of the ranks' common store that belongs to one load.

    Every rank counts its own loads, in the store: the same load has the same number.

    :param store: a store of the process group, or of the launcher.
    :param deadline: seconds that a question to the store may take.
    :raises LoadFailedError: the store is gone.
    """

    def __init__(self, store: Any, rank: int, size: int, deadline: float) -> None:
        self.rank = rank
        self.size = size
        self.base, self.store = self._of_this_load(store, deadline)
        """The ranks' store, and the part of it that belongs to this load."""

    def _of_this_load(self, store: Any, deadline: float) -> tuple[Any, Any]:
        found: list[Any] = []

        def ask() -> None:
            try:
                own = own_client(store, deadline)
                load = own.add(f"llmload/loads/{self.rank}", 1)
                found.append((own, distributed_c10d.PrefixStore(f"llmload/{load}", own)))
            except dist.DistError as error:
                found.append(error)

        # Where the process that keeps it is stopped, a question to the store blocks for good.
        asking = threading.Thread(target=ask, name="llmload-notices", daemon=True)
        asking.start()
        asking.join(deadline)
        answer = found[0] if found else TimeoutError("it does not answer")
        if isinstance(answer, Exception):
            raise LoadFailedError(store_is_gone(answer)) from answer
        base, own = answer
        return base, own

    def announce(self, rank: int, reason: str) -> None:
        """Tell all that a rank has failed."""
        number = self.store.add("failures", 1)
        self.store.set(f"failure/{number}", json.dumps({"rank": rank, "reason": reason}))

    def failure(self) -> str | None:
        """Return the first failure that was announced, and let its rank know that we know."""
        numbers = range(1, self.store.add("failures", 0) + 1)
        # One that is numbered may not be written yet. To wait for it in the store would keep this
        # process's other threads from asking or telling anything, and it may be one of them.
        keys = (f"failure/{number}" for number in numbers)
        written = next((key for key in keys if self.store.check([key])), None)
        if written is None:
            return None
        report = json.loads(self.store.get(written))
        if report["rank"] != self.rank:
            self.store.add("told", 1)
        return f"rank {report['rank']} failed: {report['reason']}"

    def linger(self, seconds: float) -> None:
        """Stay until all others know of the failure: the store may end with this process."""
        until = time.monotonic() + seconds
        while self.store.add("told", 0) < self.size - 1 and time.monotonic() < until:
            time.sleep(POLL / 10)


def own_client(store: Any, deadline: float) -> Any:
    """Return a connection to the store that no other thread's waiting can block."""
    patience = timedelta(seconds=deadline)
    if hasattr(store, "clone"):  # torch 2.7 and newer
        before = store.timeout
        store.set_timeout(patience)  # also to connect
        try:
            return store.clone()
        finally:
            store.set_timeout(before)
    server: Any = getattr(store, "_underlying_non_prefix_store", store)
    if not hasattr(server, "host"):  # no TCPStore
        return store
    own = type(server)(
        server.host, server.port, is_master=False, timeout=patience, wait_for_workers=False
    )
    # A clone has the prefix of the group, which torchrun changes when it starts the ranks anew.
    return distributed_c10d.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), own)


def store_is_gone(error: BaseException) -> str:
    """Return the reason where a question to the store was not answered."""
    first = str(error).partition("\n")[0]
    return (
        "the process that keeps the ranks' common store (rank 0, unless the launcher does) ended or"
        f" hangs: {first}"
    )
