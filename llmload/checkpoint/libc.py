"""The calls of the C library that Python's own modules do not offer for memory that torch made."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_HUGE = 2**21
"""Bytes of a huge page on x86-64, and on most others."""


@cache
def libc() -> Any:
    """Return the C library with the calls for mappings declared; they set ``ctypes``' errno."""
    library = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.mmap.restype = address
    library.mmap.argtypes = [address, size, number, number, number, ctypes.c_int64]
    library.munmap.argtypes = [address, size]
    library.madvise.argtypes = [address, size, number]
    return library


def prefer_huge_pages(tensor: torch.Tensor) -> None:
    """Ask for huge pages behind a new tensor on the CPU that is about to be filled.

    A page fault per 4 KiB takes longer than a cast does. Linux gives them where
    ``/sys/kernel/mm/transparent_hugepage/enabled`` says ``madvise``, as most distributions do;
    elsewhere, and for small tensors, nothing happens.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or tensor.nbytes < _HUGE or not tensor.is_contiguous():
        return
    # Whole pages: the ranges of neighbours join, and huge pages may reach from one to the next.
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    libc().madvise(start, tensor.data_ptr() + tensor.nbytes - start, advice)
