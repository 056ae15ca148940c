"""The ranks of a launcher: how many there are, and how they come together.

Imported lazily, by functions: this module needs torch.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from llmload import LoadFailedError, RequestError
from llmload.builtin.zero3.notices import POLL, Notices

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int | None:
    """Return the number of ranks, or None where no launcher has started any."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if _launched() else None


def rank() -> int:
    """Return this process's rank; 0 where no launcher has started any."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if _launched() else 0


def _launched() -> bool:
    return all(name in os.environ for name in _LAUNCHER)


def connect(deadline: float = 15.0) -> None:
    """Initialise torch.distributed as DeepSpeed does, unless the caller has.

    Ranks that still start or plan are waited for as long as DeepSpeed waits, ten minutes unless
    ``DEEPSPEED_TIMEOUT`` says otherwise; one whose plan has failed stops the others at once.

    :raises RequestError: the process was not started by a launcher.
    :raises LoadFailedError: another rank has failed, or does not come.
    """
    import deepspeed

    if not dist.is_initialized() and not _launched():
        missing = ", ".join(name for name in _LAUNCHER if name not in os.environ)
        raise RequestError(
            f"ZeRO-3 partitions over the ranks of a launcher, and {missing} are not set",
            fix="Start the script with `torchrun --nproc_per_node N` or `deepspeed`.",
        )
    if "LOCAL_RANK" not in os.environ:
        raise RequestError(
            "DeepSpeed needs LOCAL_RANK to choose its device, and it is not set",
            fix="Start the script with `torchrun` or `deepspeed`, or set LOCAL_RANK.",
        )
    if dist.is_initialized():
        deepspeed.init_distributed(verbose=False)
        return
    patience = deepspeed.constants.default_pg_timeout.total_seconds()
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=patience)))
    _gather(Notices(store, rank, size, deadline), patience)
    deepspeed.init_distributed(verbose=False)


def _gather(notices: Notices, patience: float) -> None:
    """Wait until every rank is here, or one has announced that it will not come."""
    store, until = notices.store, time.monotonic() + patience
    store.set(f"here/{notices.rank}", "")
    store.add("here", 1)
    while store.add("here", 0) < notices.size:
        failure = notices.failure()
        if failure is not None:
            raise LoadFailedError(failure)
        if time.monotonic() > until:
            ranks = range(notices.size)
            missing = ", ".join(str(r) for r in ranks if not store.check([f"here/{r}"]))
            raise LoadFailedError(
                f"ranks {missing} did not come to the process group within {patience:g} s",
                fix="See how they ended, or allow more minutes in DEEPSPEED_TIMEOUT.",
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
    return f"{type(error).__name__}: {error}"
