"""How much memory this process may still take: by the machine, ``ulimit`` and the container."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Limit(NamedTuple):
    """What one of them leaves."""

    nbytes: int
    why: str
    """In words, such as ``by what the machine has``."""
    shared: bool
    """Whether other processes take from it too."""


def limits() -> Iterator[Limit]:
    """Yield those that this system tells of; what only pages of files take counts as free."""
    with suppress(OSError, ValueError, KeyError):
        found = _numbers("/proc/meminfo")
        swap = found["SwapFree:"]
        yield Limit(1024 * (found["MemAvailable:"] + swap), "by what the machine has", True)
    with suppress(OSError, ValueError, ImportError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            yield Limit(soft - pages * os.sysconf("SC_PAGE_SIZE"), "by `ulimit -v`", False)
    with suppress(OSError, ValueError, KeyError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        path = next(line[3:] for line in lines if line.startswith("0::"))
        group = Path("/sys/fs/cgroup", path.lstrip("/"))
        most = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        # Pages of files are given up when memory is short.
        cached = _numbers(group / "memory.stat")["file"]
        yield Limit(most - used + cached, "by the container's limit", True)


def for_pages() -> int:
    """Return how many bytes of files may be brought into memory ahead of their use.

    A quarter of what is free: what they are used for takes memory too, and so do other processes.
    """
    return min((limit.nbytes for limit in limits() if limit.shared), default=2**32) // 4


def _numbers(path: str | Path) -> dict[str, int]:
    """Read a file that has a word and a number on each line."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
