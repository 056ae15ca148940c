"""Memory: how much there is, what a load takes of it at least, and what to say when it ran out."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from llmload.checkpoint.dtypes import torch_dtype
from llmload.errors import LoadFailedError, Problem, in_one_line
from llmload.loading.wording import size_text

if TYPE_CHECKING:
    from llmload.context.context import LoadContext
    from llmload.loading.plan import Plan

_TORCH: Final = re.compile(r"can't allocate memory|not enough memory|out of memory", re.I)
"""What torch says in a ``RuntimeError`` when the CPU's or a device's memory ran out."""
_FIX: Final = "Give it more, load in a narrower dtype, or onto another device with `device_map`."


class Room(NamedTuple):
    """Memory that this process can still get."""

    nbytes: int
    limit: str
    """What there is no more of."""

    def __str__(self) -> str:
        return f"{size_text(self.nbytes)} of memory are free ({self.limit})"


def free() -> Room | None:
    """Return the tightest of the limits that this system tells of, or None."""
    return min(_limits(), default=None)


def problems(ctx: LoadContext, plan: Plan) -> Iterator[Problem]:
    """Refuse a load onto the CPU that takes more memory than there is, however it is done.

    Weights on pages of their files take none. Placements of plugins may store less, and are not
    judged.
    """
    if ctx.spec.device_map is not None or ctx.placed_by is not None or ctx.awaiting is not None:
        return
    stored = () if ctx.checkpoint is None else ctx.checkpoint.tensors.values()
    as_asked = [info.nbytes for info in stored if torch_dtype(info.dtype) == ctx.dtype]
    needed, room = plan.parameter_bytes - sum(as_asked), free()
    if room is not None and needed > room.nbytes:
        yield Problem(
            message=f"the parameters take at least {size_text(needed)} of memory beside the"
            f" checkpoint's files, and {room}",
            fix=_FIX,
        )


def ran_out(error: BaseException) -> bool:
    """Say whether an error means that there was no more memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _TORCH.search(str(error)) is not None
    )


def advice(error: BaseException) -> str:
    """Return what to do about an error if memory ran out, else nothing."""
    if not ran_out(error):
        return ""
    room = free()
    return f"{room}. {_FIX}" if room else _FIX


def refusal(what: str, error: BaseException) -> LoadFailedError:
    """Return the error of a load that ran out of memory outside of any plugin."""
    return LoadFailedError(f"{what} ran out of memory: {in_one_line(error)}", fix=advice(error))


def _limits() -> Iterator[Room]:
    with suppress(OSError, ValueError, KeyError):
        found = _numbers("/proc/meminfo")
        swap = found["SwapFree:"]
        yield Room(1024 * (found["MemAvailable:"] + swap), "by what the machine has")
    with suppress(OSError, ValueError, ImportError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            yield Room(soft - pages * os.sysconf("SC_PAGE_SIZE"), "by `ulimit -v`")
    with suppress(OSError, ValueError, KeyError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        path = next(line[3:] for line in lines if line.startswith("0::"))
        group = Path("/sys/fs/cgroup", path.lstrip("/"))
        most = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        # Pages of files are given up when memory is short.
        cached = _numbers(group / "memory.stat")["file"]
        yield Room(most - used + cached, "by the container's limit")


def _numbers(path: str | Path) -> dict[str, int]:
    """Read a file that has a word and a number on each line."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
