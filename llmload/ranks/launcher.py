"""How the ranks of a launcher come together, and what one says that does not come.

Imported lazily, by functions: this module needs torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from llmload.errors import LoadFailedError, RequestError
from llmload.ranks.environment import LAUNCHER, launched
from llmload.ranks.notices import POLL, Notices
from llmload.ranks.presence import Presences


def connect(
    start: Callable[[], None],
    *,
    what: str,
    patience: float,
    deadline: float = 15.0,
    allow: str = "",
) -> None:
    """Wait for the ranks of the launcher, and initialise torch.distributed.

    Ranks that still start are waited for with patience; one whose plan has failed, or that gives no
    sign of life while it plans, stops the others at once. Where the caller has a process group
    already, only ``start`` is called.

    :param start: initialises torch.distributed where nobody has.
    :param what: what a message says of the load, such as "ZeRO-3 partitions".
    :param patience: seconds to wait for ranks that nothing is known of.
    :param deadline: seconds of silence after which a rank counts as failed.
    :param allow: how a user allows more patience, for the message.
    :raises RequestError: the process was not started by a launcher.
    :raises LoadFailedError: another rank has failed, or does not come.
    """
    if not dist.is_initialized():
        if not launched():
            missing = ", ".join(name for name in LAUNCHER if name not in os.environ)
            raise RequestError(
                f"{what} over the ranks of a launcher, and {missing} are not set",
                fix="Start the script with `torchrun --nproc_per_node N` or `deepspeed`.",
            )
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=patience)))
        _gather(Notices(store, rank, size, deadline), patience, deadline, allow)
    start()


def _gather(notices: Notices, patience: float, deadline: float, allow: str) -> None:
    """Wait until every rank is here, or one is known not to come."""
    store, until = notices.store, time.monotonic() + patience
    store.set(f"here/{notices.rank}", "")
    store.add("here", 1)
    others = Presences(notices, deadline)
    while store.add("here", 0) < notices.size:
        absent = [r for r in range(notices.size) if not store.check([f"here/{r}"])]
        failure = notices.failure() or others.lost(absent)
        if failure is not None:
            raise LoadFailedError(failure)
        if time.monotonic() > until:
            missing = ", ".join(map(str, absent))
            raise LoadFailedError(
                f"ranks {missing} did not come to the process group within {patience:g} s",
                fix=f"See how they ended{allow}.",
            )
        time.sleep(POLL)


def tell(error: BaseException, deadline: float) -> None:
    """Let the other ranks know that this rank will not come to their load, and why."""
    store: Any
    if dist.is_initialized():
        store = distributed_c10d._get_default_store()
        rank, size = dist.get_rank(), dist.get_world_size()
    else:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=deadline)))
    notices = Notices(store, rank, size, deadline)
    notices.announce(rank, reason(error))
    notices.failure()
    with suppress(dist.DistError):
        notices.linger(deadline)


def reason(error: BaseException) -> str:
    """Return what the other ranks are told of an error."""
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted, as by Ctrl-C"
    return f"{type(error).__name__}: {error}"
