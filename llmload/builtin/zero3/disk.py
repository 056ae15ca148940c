"""What DeepSpeed needs to keep partitions on a disk (ZeRO-Infinity).

Imported lazily, by functions: this module needs deepspeed.
"""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.ops.op_builder import AsyncIOBuilder

from llmload.builtin.zero3.config import DeepSpeedConfig
from llmload.plugin import Problem


def problems(config: DeepSpeedConfig) -> Iterator[Problem]:
    """Yield what would stop DeepSpeed when it first writes: here, or in ``initialize``."""
    for key in ("offload_param", "offload_optimizer"):
        offload = config.zero.get(key) or {}
        if offload.get("device") != "nvme":
            continue
        where = f"zero3.config.zero_optimization.{key}"
        if not offload.get("nvme_path"):
            yield Problem(
                where=where,
                message="`device: nvme` needs `nvme_path`",
                fix="Name a folder on a local fast disk in `nvme_path`.",
            )
        if not AsyncIOBuilder().is_compatible(verbose=False):
            yield Problem(
                where=where,
                message="`device: nvme` needs DeepSpeed's operator async_io, which cannot be built"
                " here: libaio or its header libaio.h is missing",
                fix="Install libaio (`apt-get install libaio-dev`, `dnf install libaio-devel`), or"
                " write `device: cpu`.",
            )
