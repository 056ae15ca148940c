"""The calls of the C library that Python's own modules do not offer for memory that torch made."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_POPULATE_WRITE = 23
"""``MADV_POPULATE_WRITE`` of Linux 5.14, which Python's ``mmap`` does not name."""
_WORTH_A_CALL = 2**17
"""Bytes; glibc's allocator maps larger ones by themselves, smaller ones may be there already."""


@cache
def libc() -> Any:
    """Return the C library with the calls for mappings declared; they set ``ctypes``' errno."""
    library = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.mmap.restype = address
    library.mmap.argtypes = [address, size, number, number, number, ctypes.c_int64]
    library.munmap.argtypes = [address, size]
    library.madvise.argtypes = [address, size, number]
    library.mincore.argtypes = [address, size, address]
    return library


def mapped(descriptor: int, offset: int, length: int, protection: int, flags: int) -> Any:
    """Map bytes of a file as a ``ctypes`` array, which unmaps them with the last use of it.

    Python's own ``mmap`` keeps a file descriptor for each mapping, as long as it lives. The offset
    is a multiple of the page size; a descriptor of -1 maps no file.

    :raises OSError: with the number of what is wrong.
    """
    address = libc().mmap(None, length, protection, flags, descriptor, offset)
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    memory = (ctypes.c_ubyte * length).from_address(address)
    weakref.finalize(memory, libc().munmap, address, length).atexit = False
    return memory


def populate(tensor: torch.Tensor) -> None:
    """Have the pages of a new tensor on the CPU there before it is filled.

    A page fault for every 4 KiB takes a fifth of the time of a cast; this is one call. Nothing
    happens for small tensors, those with gaps, and where the kernel knows no such call.
    """
    if tensor.nbytes < _WORTH_A_CALL or not tensor.is_contiguous():
        return
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    libc().madvise(start, tensor.data_ptr() + tensor.nbytes - start, _POPULATE_WRITE)
