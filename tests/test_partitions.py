"""Partition helpers on whole models; tests/zero3 has them on partitioned ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmload.errors import CheckpointError
from llmload.model import partitions


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


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
