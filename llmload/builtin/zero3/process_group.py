"""The process group of the ranks, made as DeepSpeed makes it.

Imported lazily, by functions: this module needs torch and deepspeed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

import deepspeed
import torch.distributed as dist

from llmload.plugin import RequestError
from llmload.plugin import connect as gather

_OPERATORS: Final = ("deepspeed_shm_comm",)
"""What DeepSpeed compiles when it meets, where no GPU is."""
_ABANDONED: Final = 900.0
"""Seconds after which no compiler is at work any more; it takes one to four minutes."""


def connect(deadline: float = 15.0) -> None:
    """Initialise torch.distributed as DeepSpeed does, unless the caller has.

    Ranks that still start are waited for as long as DeepSpeed waits, ten minutes unless
    ``DEEPSPEED_TIMEOUT`` says otherwise.

    :raises RequestError: the process was not started by a launcher; what DeepSpeed compiles is
        locked by a process that was killed.
    :raises LoadFailedError: another rank has failed, or does not come.
    """
    if dist.is_initialized() and "LOCAL_RANK" not in os.environ:
        raise RequestError(
            "DeepSpeed needs LOCAL_RANK to choose its device, and it is not set",
            fix="Start the script with `torchrun` or `deepspeed`, or set LOCAL_RANK.",
        )
    _refuse_abandoned_locks()
    gather(
        lambda: deepspeed.init_distributed(verbose=False),
        what="ZeRO-3 partitions",
        patience=deepspeed.constants.default_pg_timeout.total_seconds(),
        deadline=deadline,
        allow=", or allow more minutes in DEEPSPEED_TIMEOUT",
    )


def _refuse_abandoned_locks() -> None:
    """Raise ``RequestError`` where every rank would wait for a compiler that is no more.

    torch lets one process compile and all others wait until its lock is gone, for ever if it was
    killed.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for name in _OPERATORS:
        for lock in (root / name / "lock", *root.glob(f"*/{name}/lock")):
            if lock.exists() and time.time() - lock.stat().st_mtime > _ABANDONED:
                raise RequestError(
                    f"a process that was killed while it compiled {name} for DeepSpeed has left a"
                    " lock, on which every rank would wait for ever",
                    fix=f"Remove the folder {str(lock.parent)!r}.",
                    where="zero3",
                    file=str(lock),
                )
