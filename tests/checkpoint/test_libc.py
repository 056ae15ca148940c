"""Large pages for what is filled: asked for whole tensors, and for nothing that is small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from llmload.checkpoint.libc import prefer_huge_pages

MIB = 2**20


def asked_for_huge_pages(tensor: torch.Tensor) -> list[bool]:
    """What the kernel says of the first, the middle and the last byte, ``hg`` or not."""
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes - 1
    flags = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            bounds = range(*(int(address, 16) for address in found.groups()))
        elif line.startswith("VmFlags:"):
            flags[bounds] = "hg" in line.split()
    spots = (first, (first + last) // 2, last)
    return [next(flags[bounds] for bounds in flags if spot in bounds) for spot in spots]


def test_a_large_tensor_lies_in_memory_for_which_huge_pages_are_asked() -> None:
    tensor = torch.empty(40 * MIB, dtype=torch.uint8)
    assert asked_for_huge_pages(tensor) == [False] * 3
    prefer_huge_pages(tensor)
    assert asked_for_huge_pages(tensor) == [True] * 3


@pytest.mark.parametrize("tensor", [torch.zeros(10), torch.zeros(4096, 4096).T, torch.zeros(0)])
def test_small_tensors_and_those_with_gaps_are_left_alone(tensor: torch.Tensor) -> None:
    before = Path("/proc/self/smaps").read_text().count(" hg ")
    prefer_huge_pages(tensor)
    assert Path("/proc/self/smaps").read_text().count(" hg ") == before
