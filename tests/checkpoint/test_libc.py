"""Memory that is there before it is filled."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch

from llmload.checkpoint.libc import populate

MIB = 2**20


def resident(tensor: torch.Tensor) -> float:
    """Share of the pages that lie within a tensor and are in memory."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE
    found = (ctypes.c_ubyte * pages)()
    mincore = ctypes.CDLL(None).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    assert mincore(start, pages * mmap.PAGESIZE, found) == 0
    return sum(flag & 1 for flag in found) / pages


def test_all_pages_of_a_large_tensor_are_there_before_it_is_filled() -> None:
    tensor = torch.empty(40 * MIB, dtype=torch.uint8)
    assert resident(tensor) < 0.1
    populate(tensor)
    assert resident(tensor) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(2**14, dtype=torch.uint8),
        lambda: torch.empty(4096, 4096).T,
        lambda: torch.empty(0),
    ],
    ids=["small", "with gaps", "empty"],
)
def test_small_tensors_and_those_with_gaps_are_left_alone(
    make: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(make)
    monkeypatch.setattr("llmload.checkpoint.libc.libc", lambda: pytest.fail("it was asked"))
    populate(make())


def test_a_kernel_that_does_not_know_the_call_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmload.checkpoint.libc._POPULATE_WRITE", 9999)
    tensor = torch.empty(MIB, dtype=torch.uint8)
    populate(tensor)
    tensor.fill_(1)
    assert tensor.all()
