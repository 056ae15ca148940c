"""Trainers started with a DeepSpeed config train a model of ours as their own, on two ranks."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from once import once
from zero3.farm import Job, Outcome, launch
from zero3.grouping import digests

import llmload
from llmload import testing

KINDS = ["trainer", *(("sft", "dpo") if importlib.util.find_spec("trl") else ())]
WAYS = {"theirs": KINDS, "before": KINDS[:1], "after": KINDS}
"""The tool's own path, and ours before and after the arguments are made, as scripts of TRL do."""
CASES = [
    (way, f"{kind} {what}") for way in WAYS for kind in WAYS[way] for what in ("full", "adapter")
]
OURS = [case for case in CASES if case[0] != "theirs"]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(_run(tmp_path_factory)["place"])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each way gave on each rank."""
    return results(_run(tmp_path_factory)["outcomes"])


def results(outcomes: Mapping[str, list[Outcome]]) -> dict[str, list[dict[str, Any]]]:
    """Return what every rank gave, each way; fail with the output of one that ended otherwise."""
    for ranks in outcomes.values():
        for rank in ranks:
            assert rank.code == 0, rank.output
    return {way: [rank.result for rank in ranks] for way, ranks in outcomes.items()}


def _run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    def make() -> dict[str, Any]:
        place = tmp_path_factory.mktemp("trainers")
        return {"place": str(place), "outcomes": train_each_way(place, WAYS)}

    return once(tmp_path_factory, "trainers", make)


def train_each_way(place: Path, ways: Mapping[str, list[str]]) -> dict[str, list[Outcome]]:
    """Train with each kind of trainer that a way names, on two ranks; return how each ended."""
    folder = testing.tiny_llama(place, dtype=torch.bfloat16, pad=True)
    jobs = []
    for way, kinds in ways.items():
        own = place / way
        own.mkdir()
        arguments = {"folder": str(folder), "place": str(own), "way": way, "kinds": kinds}
        jobs.append(Job("zero3.training:every", arguments, timeout=200))
    return dict(zip(ways, launch(jobs, timeout=280), strict=True))


@pytest.mark.parametrize(("way", "case"), OURS)
def test_a_model_of_ours_is_trained_to_the_losses_of_the_tools_own_path(
    found: dict[str, list[dict[str, Any]]], way: str, case: str
) -> None:
    for mine, other in zip(found[way], found["theirs"], strict=True):
        assert_trained_alike(mine[case], other[case])


def assert_trained_alike(mine: dict[str, Any], other: dict[str, Any]) -> None:
    """Hold three falling losses, and every parameter after them, to those of the own path."""
    assert mine["losses"] == other["losses"]
    assert len(mine["losses"]) == 3
    assert mine["losses"] == sorted(mine["losses"], reverse=True)
    assert mine["partitioned"]
    assert trained(mine) == trained(other)


def trained(outcome: dict[str, Any]) -> dict[str, str]:
    """Return the digests of all but the adapter that TRL makes of ours to compare with it."""
    return {name: digest for name, digest in outcome["digests"].items() if ".ref." not in name}


@pytest.mark.parametrize(("way", "case"), OURS)
def test_what_the_trainer_saves_loads_unsharded_bit_by_bit(
    place: Path, found: dict[str, list[dict[str, Any]]], way: str, case: str
) -> None:
    """With ``stage3_gather_16bit_weights_on_model_save`` in the DeepSpeed config."""
    saved = str(place / way / case.replace(" ", "-"))
    spec: dict[str, Any] = {"model": saved}
    if case.endswith("adapter"):
        spec = {"model": str(place / "llama"), "lora": {"adapter": saved, "adapter_dtype": "base"}}
    for rank in found[way]:
        assert digests(llmload.load(spec).model) == trained(rank[case])
