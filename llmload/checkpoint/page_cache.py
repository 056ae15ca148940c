"""What of a file the kernel has in memory already, so that reading it costs no request."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from typing import Any

from llmload.checkpoint import libc

_WINDOW = 2**17
"""Bytes that are looked at in one place of a file, and in one call."""
_LOWEST = bytes(value & 1 for value in range(256))
"""Of each byte of ``mincore`` the bit that says whether a page is there; others are reserved."""


class PageCache:
    """Asks the kernel which pages of an open file are in memory. Linux; nothing is read for it.

    To a user who neither owns the file nor may write to it, the kernel says that all are
    (``mincore(2)``, since Linux 5.2, lest it tells what others read): then nothing is known here.

    :param descriptor: of the file, which may be closed afterwards.
    :raises OSError: its file system cannot map files.
    """

    def __init__(self, descriptor: int) -> None:
        state = os.fstat(descriptor)
        self._size = state.st_size
        self._map: Any = None
        if self._size:
            self._map = libc.mapped(descriptor, 0, self._size, mmap.PROT_READ, mmap.MAP_SHARED)
        self.is_known = sys.platform == "linux" and (
            os.geteuid() in (0, state.st_uid) or os.access(f"/proc/self/fd/{descriptor}", os.W_OK)
        )
        """Whether the kernel would say of a page that it is not there."""

    def holds(self, start: int, stop: int) -> bool:
        """Whether all pages from a byte to another are in memory; False where nothing is known."""
        if self._map is None:
            return True
        if not self.is_known:
            return False
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        for place in range(first, min(stop, self._size), _WINDOW):
            length = min(_WINDOW, stop - place, self._size - place)
            found = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
            address = ctypes.addressof(self._map) + place
            if libc.libc().mincore(address, length, found) or 0 in bytes(found).translate(_LOWEST):
                return False
        return True

    def seems_whole(self, places: int) -> bool:
        """Whether the file is in memory, by so many places of 128 KiB all over it, and its end.

        False where nothing is known.
        """
        step = max(_WINDOW, -(-self._size // places))
        return all(
            self.holds(place, min(place + _WINDOW, self._size))
            for place in (*range(0, self._size, step), max(0, self._size - _WINDOW))
        )


def expect(descriptor: int, *, sequence: bool) -> None:
    """Tell the kernel how a file will be read through a descriptor.

    :param sequence: on and on, so that it reads ahead of what is asked for, in larger requests;
        else here and there, so that it reads nothing more.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        advice = os.POSIX_FADV_SEQUENTIAL if sequence else os.POSIX_FADV_RANDOM
        os.posix_fadvise(descriptor, 0, 0, advice)


def read_on(descriptor: int) -> int | None:
    """Return how many bytes past the end of a read the kernel may fetch, where it is told that
    reads are sequential; None where the system does not say.

    It doubles its window then, and begins with the next one before the last is used up.
    """
    device = os.fstat(descriptor).st_dev
    place = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    try:
        with open(place) as file:
            return 4 * 1024 * int(file.read())
    except (OSError, ValueError):
        return None
