"""Run on every rank: which pages of its own copy of a folder a load of its part has touched."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import llmload
from llmload.checkpoint import filesystem, libc


def load(place: str) -> dict[str, Any]:
    """Load ``model`` in the folder of this rank, with none of its files in memory.

    Pages are in the memory of a host, not of a rank: by copies of its own each rank is known.
    """
    os.chdir(Path(place, os.environ["RANK"]))
    files = sorted(Path("model").glob("*.safetensors"))
    for file in files:
        forget(file)
    before = {file.name: resident(file) for file in files}
    result = llmload.load(
        {
            "model": "model",
            "dtype": "bfloat16",
            "zero3": {},
            "streaming": {"reading": "ahead"},
        }
    )
    after = {file.name: resident(file) for file in files}
    return {"before": before, "after": after, "loader": result.report.loader}


def forget(file: Path) -> None:
    """Have the kernel forget a file."""
    filesystem.sync(file)
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def resident(file: Path) -> list[int]:
    """Return the numbers of the pages of a file that are in memory."""
    descriptor, size = os.open(file, os.O_RDONLY), file.stat().st_size
    pages = libc.mapped(descriptor, 0, size, mmap.PROT_READ, mmap.MAP_SHARED)
    os.close(descriptor)
    found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    assert libc.libc().mincore(ctypes.addressof(pages), size, found) == 0
    return [number for number, page in enumerate(found) if page & 1]
