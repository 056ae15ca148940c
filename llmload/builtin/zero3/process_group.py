"""The process group of the ranks, made as DeepSpeed makes it.

Imported lazily, by functions: this module needs torch and deepspeed.
"""

from __future__ import annotations

import os

import deepspeed
import torch.distributed as dist

from llmload.plugin import RequestError
from llmload.plugin import connect as gather


def connect(deadline: float = 15.0) -> None:
    """Initialise torch.distributed as DeepSpeed does, unless the caller has.

    Ranks that still start are waited for as long as DeepSpeed waits, ten minutes unless
    ``DEEPSPEED_TIMEOUT`` says otherwise.

    :raises RequestError: the process was not started by a launcher.
    :raises LoadFailedError: another rank has failed, or does not come.
    """
    if dist.is_initialized() and "LOCAL_RANK" not in os.environ:
        raise RequestError(
            "DeepSpeed needs LOCAL_RANK to choose its device, and it is not set",
            fix="Start the script with `torchrun` or `deepspeed`, or set LOCAL_RANK.",
        )
    gather(
        lambda: deepspeed.init_distributed(verbose=False),
        what="ZeRO-3 partitions",
        patience=deepspeed.constants.default_pg_timeout.total_seconds(),
        deadline=deadline,
        allow=", or allow more minutes in DEEPSPEED_TIMEOUT",
    )
