"""What is stacked and concatenated is read piece by piece, and is what torch would make."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmload.checkpoint.assembled import Assembled, StandIn, itself, storage_of
from llmload.checkpoint.header import TensorInfo

Taken = list[tuple[TensorInfo, torch.Tensor]]
Tensors = list[torch.Tensor]


def taken(tensors: Tensors) -> Taken:
    """Stand-ins for the tensors, as the engine hands them to transformers."""
    info = TensorInfo("x", Path("x"), "F32", (1,), 0, 4)
    return [(info, StandIn(tensor, tensor.device)) for tensor in tensors]


def hold(value: torch.Tensor, expected: torch.Tensor, of: Taken) -> None:
    """Hold parts of ``value`` to those of ``expected``: they are views of what was taken."""
    assert (value.shape, value.dtype) == (expected.shape, expected.dtype)
    found = Assembled.of(value, of)
    assert found is not None
    flat, size = expected.reshape(-1), expected.numel()
    parts = [(0, 0), (0, size), *(sorted(random.choices(range(size + 1), k=2)) for _ in range(20))]
    for start, stop in parts:
        pieces = list(found.pieces(start, stop))
        assert torch.equal(torch.cat([torch.empty(0), *pieces]), flat[start:stop])
        assert {storage_of(piece) for piece in pieces} <= {storage_of(t) for _, t in of}
        assert len(pieces) <= 1 or all(piece.numel() for piece in pieces)
    assert torch.equal(itself(value), expected)


@pytest.mark.parametrize("concatenated", [0, 1, 2, -1])
@pytest.mark.parametrize("stacked", [0, 1, 2, -1])
@pytest.mark.parametrize("experts", [1, 5])
def test_stacks_that_are_concatenated_are_read_in_pieces(
    experts: int, stacked: int, concatenated: int
) -> None:
    def make(gates: Tensors, ups: Tensors) -> torch.Tensor:
        stacks = [torch.stack(each, dim=stacked) for each in (gates, ups)]
        return torch.cat(stacks, dim=concatenated)

    gates, ups = ([torch.rand(3, 4) for _ in range(experts)] for _ in range(2))
    of = taken([*gates, *ups])
    stand_ins = [stand_in for _, stand_in in of]
    hold(make(stand_ins[:experts], stand_ins[experts:]), make(gates, ups), of)


@pytest.mark.parametrize("dim", [0, 1])
def test_tensors_of_different_sizes_are_concatenated_in_pieces(dim: int) -> None:
    tensors = [torch.rand((size, 4) if dim == 0 else (4, size)) for size in (2, 1, 3)]
    of = taken(tensors)
    hold(torch.cat([stand_in for _, stand_in in of], dim=dim), torch.cat(tensors, dim=dim), of)


def test_rows_that_are_split_off_are_views() -> None:
    fused = torch.rand(6, 4)
    of = taken([fused])
    for made, expected in zip(
        torch.chunk(of[0][1], 3, dim=0), torch.chunk(fused, 3, dim=0), strict=True
    ):
        hold(made.contiguous(), expected, of)


@pytest.mark.parametrize(
    "operation",
    [
        lambda a, b: torch.chunk(a, 2, dim=1)[0].contiguous(),
        lambda a, b: torch.transpose(a, 0, 1).contiguous(),
        lambda a, b: torch.stack([torch.transpose(a, 0, 1), torch.transpose(b, 0, 1)]),
        lambda a, b: torch.stack([a, b]).reshape(4, 4).sum(dim=0),
        lambda a, b: torch.cat([a, b.double()]),
        lambda a, b: a + b,
    ],
)
def test_everything_else_is_computed_at_once(
    operation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    tensors = [torch.rand(2, 4), torch.rand(2, 4)]
    of = taken(tensors)
    made = operation(*(stand_in for _, stand_in in of))
    assert Assembled.of(made, of) is None
    assert torch.equal(itself(made), operation(*tensors))


def test_shapes_that_do_not_go_together_are_refused_as_by_torch() -> None:
    stand_ins = [stand_in for _, stand_in in taken([torch.rand(2, 4), torch.rand(3, 4)])]
    errors = (RuntimeError, AssertionError)  # the latter in torch 2.5
    with pytest.raises(errors, match="stack expects each tensor to be equal size"):
        torch.stack(stand_ins)


def test_stand_ins_on_the_meta_device_join_without_values() -> None:
    of = taken([torch.empty(2, 4, device="meta") for _ in range(3)])
    made = torch.stack([stand_in for _, stand_in in of])
    assert (made.shape, made.device.type, made.nbytes) == ((3, 2, 4), "meta", 96)
    assert Assembled.of(made, of) is not None
