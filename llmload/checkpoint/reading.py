"""How the bytes of a checkpoint come into memory: by page faults, ahead of them, or by reads.

A mapped file that is not in the page cache is read as its pages are touched, one read-ahead window
after the other: where each request takes its time, as on a network, a load then takes as long as
all of them together. Several threads that read large pieces keep several requests under way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from llmload.checkpoint import filesystem
from llmload.checkpoint.contents import Checkpoint, CheckpointFile
from llmload.checkpoint.folder import regular_file
from llmload.checkpoint.page_cache import PageCache
from llmload.errors import CheckpointError

Way: TypeAlias = Literal["mapped", "ahead", "read"]

_IN_MEMORY = frozenset({"devtmpfs", "hugetlbfs", "ramfs", "tmpfs"})
_LOCAL: Final = (4, 2**22)
"""Threads, and bytes that each reads at a time, of a disk of this machine; from there on more of
them do not help."""
_FAR: Final = (16, 2**20)
"""The same where a request is some way off: as many under way as such a file system answers."""
_WORTH_ASKING: Final = 2**20
"""Bytes of a checkpoint below which it is read sooner than it is found out how."""
_PLACES: Final = (32, 256)
"""Places of a file, and of all files together, that tell whether they are in memory: what was
evicted is seldom a single page."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How a load reads its files."""

    way: Way = "mapped"
    """``mapped``: as pages are touched. ``ahead``: threads have the kernel fetch what will be read,
    before it is. ``read``: into memory of the process's own, no page of a file being mapped."""
    threads: int = 1
    piece: int = 2**20
    """Bytes that a thread reads at a time."""
    why: str = ""
    """In words, such as ``not in memory yet, on nfs4``; empty for what nobody needs to be told."""

    @classmethod
    def choose(cls, checkpoint: Checkpoint, asked: Way | Literal["auto"]) -> Reading:
        """Decide how to read a checkpoint, by where its files lie and whether they are in memory.

        :param asked: a way, or ``auto``.
        """
        files = [
            file for file in checkpoint.files if file.fetch is None and file.is_here and file.size
        ]
        kind = filesystem.kind(files[0].path) if files else ""
        threads, piece = _FAR if filesystem.is_shared(kind) or kind.startswith("fuse") else _LOCAL
        on = f"on {kind}" if kind else "on a disk"
        if asked != "auto":
            return cls(asked, threads, piece, "as the spec asks")
        if sys.platform != "linux" or sum(file.size for file in files) < _WORTH_ASKING:
            return cls()
        if kind in _IN_MEMORY:
            return cls()
        try:
            each = max(1, min(_PLACES[0], _PLACES[1] // len(files)))
            asked_of = (_seems_whole(file, each) for file in files)
            found = next((found for found in asked_of if not found), True)
        except CheckpointError:
            return cls()  # for the load to say what became of them
        if found is None:
            return cls("read", threads, piece, f"files {on} cannot be mapped")
        if found:
            return cls()
        return cls("ahead", threads, piece, f"not in memory yet, {on}")


def _seems_whole(file: CheckpointFile, places: int) -> bool | None:
    """Say whether a file is in memory, by so many places; None where it cannot be mapped."""
    with regular_file(file.path) as (descriptor, _):
        try:
            return PageCache(descriptor).seems_whole(places)
        except OSError:
            return None


class Reader(AbstractContextManager["Reader"]):
    """Reads files into memory that is given, in several pieces at a time.

    At the end of the ``with`` block no thread is left.
    """

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._pool: ThreadPoolExecutor | None = None

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def read(self, descriptor: int, spans: Iterable[tuple[int, memoryview]]) -> bool:
        """Fill each memory with the file's bytes from the place before it on.

        :return: whether the file has them all.
        :raises OSError: it cannot be read.
        """
        pieces = list(self._pieces(spans))
        if len(pieces) == 1 or self._reading.threads == 1:
            return all(filled(descriptor, start, memory) for start, memory in pieces)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._reading.threads, "llmload-read")
        jobs = [self._pool.submit(filled, descriptor, *piece) for piece in pieces]
        wait(jobs)  # nothing is written to the memory any more, whatever is raised
        return all(job.result() for job in jobs)

    def _pieces(self, spans: Iterable[tuple[int, memoryview]]) -> Iterator[tuple[int, memoryview]]:
        size = self._reading.piece
        for start, memory in spans:
            for place in range(0, len(memory), size):
                yield start + place, memory[place : place + size]


def filled(descriptor: int, start: int, memory: memoryview) -> bool:
    """Fill memory with a file's bytes from ``start`` on; False where the file ends before."""
    while memory:
        count = os.preadv(descriptor, [memory], start)
        if not count:
            return False
        start, memory = start + count, memory[count:]
    return True
