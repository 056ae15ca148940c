"""Which pages of a file the kernel has in memory, by its own account, and how it forgets them."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

from llmload.checkpoint import filesystem, libc


def evict(*paths: Path) -> None:
    """Have the kernel forget files; it keeps what was not written to the disk yet."""
    for path in paths:
        filesystem.sync(path)
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def resident(path: Path) -> set[int]:
    """Numbers of the pages of a file that are in memory."""
    descriptor, size = os.open(path, os.O_RDONLY), path.stat().st_size
    pages = libc.mapped(descriptor, 0, size, mmap.PROT_READ, mmap.MAP_SHARED)
    os.close(descriptor)
    found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    assert libc.libc().mincore(ctypes.addressof(pages), size, found) == 0
    return {number for number, page in enumerate(found) if page & 1}
