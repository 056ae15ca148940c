"""Memory that is there before it is filled."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from llmload.checkpoint.libc import populate

MIB = 2**20


def resident(tensor: torch.Tensor) -> int:
    """Bytes of the mapping around a tensor that are in memory."""
    inside, size = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(address, 16) for address in found.groups())
            inside = first <= tensor.data_ptr() < last
        elif inside and line.startswith("Rss:"):
            size = int(line.split()[1]) * 1024
    return size


def test_all_pages_of_a_large_tensor_are_there_and_empty() -> None:
    tensor = torch.empty(40 * MIB, dtype=torch.uint8)
    before = resident(tensor)
    populate(tensor)
    assert resident(tensor) >= before + 39 * MIB
    assert not tensor.any()


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
