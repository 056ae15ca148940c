"""Partition helpers on whole models; tests/zero3 has them on partitioned ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llmload.errors import CheckpointError
from llmload.model import partitions
from llmload.testing import run_on_ranks


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


class Halved:
    """A part as a plugin keeps it, of ranks that are all this process."""

    group: Any = None
    device = torch.device("cpu")

    def __init__(self, whole: torch.Tensor) -> None:
        self.all = whole.flatten()
        self.part, self.start = self.all[self.all.numel() // 2 :].clone(), self.all.numel() // 2
        self.shape = whole.shape

    def gather(self) -> torch.Tensor:
        return torch.cat([self.all[: self.start], self.part]).view(self.shape)

    def split(self, parameters: Any) -> None:
        for parameter in parameters:
            parameter.parted = Halved(parameter.detach())
            parameter.data = torch.full((1,), torch.nan).expand(parameter.shape)


def halved() -> nn.Linear:
    model = nn.Linear(4, 3, bias=False)
    Halved(model.weight.detach()).split([model.weight])
    return model


def test_a_parameter_that_carries_its_part_has_its_shape_and_is_whole_for_a_block() -> None:
    model: Any = halved()
    assert partitions.is_partitioned(model.weight)
    assert (partitions.shape(model.weight), partitions.elements(model.weight)) == ((3, 4), 12)
    part, start = partitions.held(model.weight) or (None, 0)
    assert (part.numel(), start) == (6, 6)
    with partitions.whole([model.weight]):
        assert not partitions.is_partitioned(model.weight)
        model.weight.data = torch.arange(16.0).view(4, 4)
    assert partitions.shape(model.weight) == (4, 4)
    part, start = partitions.held(model.weight)
    assert part.tolist() == list(range(8, 16))


def test_a_state_dict_is_copied_into_the_parts_that_parameters_carry() -> None:
    model: Any = halved()
    partitions.load_state_dict(model, {"weight": torch.arange(12.0).view(3, 4)})
    assert model.weight.parted.part.tolist() == list(range(6, 12))
    assert model.weight.isnan().all()


def spread() -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    value = torch.arange(12.0).view(3, 4)
    found: list[Any] = []
    for placement in (Shard(0), Shard(1), Replicate()):
        tensor = distribute_tensor(value, mesh, [placement])
        held = partitions.held(tensor)
        assert partitions.is_partitioned(tensor)
        assert partitions.shape(tensor) == (3, 4)
        found.append(None if held is None else (held[0].tolist(), held[1]))
    return found


def test_the_rows_of_a_dtensor_are_what_is_held_and_columns_are_not_one_piece() -> None:
    first, second = run_on_ranks(spread)
    everything = ([float(number) for number in range(12)], 0)
    assert first == [(everything[0][:8], 0), None, everything]
    assert second == [(everything[0][8:], 8), None, everything]


def test_new_module_beside_a_whole_model_stays_as_it_is() -> None:
    head = nn.Linear(3, 1)
    before = [parameter.clone() for parameter in head.parameters()]
    partitions.split(head, like=Tied())
    for parameter, value in zip(head.parameters(), before, strict=True):
        assert not partitions.is_partitioned(parameter)
        assert torch.equal(parameter, value)


def test_state_dict_is_copied_into_a_whole_model_and_one_tied_name_is_enough() -> None:
    model = Tied()
    weight, seen = torch.arange(12.0).view(4, 3), torch.ones(2)
    assert partitions.load_state_dict(model, {"head.weight": weight, "seen": seen}) == ([], [])
    assert torch.equal(model.embed.weight, weight)
    assert torch.equal(model.get_buffer("seen"), seen)


def test_state_dict_reaches_parameters_that_are_not_contiguous() -> None:
    model = nn.Linear(3, 4, bias=False)
    model.weight = nn.Parameter(torch.zeros(3, 4).t())
    value = torch.arange(12.0).view(4, 3)
    partitions.load_state_dict(model, {"weight": value})
    assert torch.equal(model.weight, value)


def test_state_dict_that_does_not_fit_is_refused_before_anything_is_copied() -> None:
    model = Tied()
    before = model.embed.weight.clone()
    with pytest.raises(CheckpointError) as caught:
        partitions.load_state_dict(model, {"embed.weight": torch.ones(5, 3), "scratch": before})
    assert [str(problem) for problem in caught.value.problems] == [
        "embed.weight: the state dict has (5, 3), the model takes (4, 3). Resize the embeddings"
        " first, or check that weights and model belong together.",
        "seen: the state dict has no values for it. Rename keys, or pass `strict=False`.",
        "scratch: the model has no place for it. Rename keys, or pass `strict=False`.",
    ]
    assert torch.equal(model.embed.weight, before)
    told = partitions.load_state_dict(model, {"embed.weight": before, "x": before}, strict=False)
    assert told == (["seen"], ["x"])


def test_state_dict_is_checked_and_not_copied_on_the_meta_device() -> None:
    model = nn.Linear(3, 4, bias=False, device="meta")
    assert partitions.load_state_dict(model, {"weight": torch.ones(4, 3)}) == ([], [])
    assert model.weight.is_meta
