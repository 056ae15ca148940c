"""Groups: a sharded policy beside a reference that is sharded, whole, or itself without adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import grouped, many

from llmload.testing import run_on_ranks, tiny_checkpoint

CASES = ("both sharded", "a whole reference", "a whole reference first", "adapter off")


def groups(folder: str) -> dict[str, dict[str, Any]]:
    policy = {"model": folder, "parallel": {}}
    frozen = {"model": folder, "trainable": False}
    adapted = policy | {"lora": {"target_modules": "all-linear"}}
    members = (
        {"policy": policy, "reference": frozen | {"parallel": {}}},
        {"policy": policy, "reference": frozen},
        {"reference": frozen, "policy": policy},
        {"policy": adapted, "reference": {"adapter_of": "policy"}},
    )
    return {case: {"models": models} for case, models in zip(CASES, members, strict=True)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("roles") / "model", "llama")
    return run_on_ranks(many, grouped, groups(str(folder)), timeout=280)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_stays_the_checkpoint_while_the_sharded_policy_trains(
    found: list[dict[str, Any]], case: str
) -> None:
    for rank in (each[case] for each in found):
        assert isinstance(rank, dict), rank
        assert rank["policy sharded"]
        assert rank["reference sharded"] == (case == "both sharded")
        assert rank["before"]
        assert rank["losses"][0] > rank["losses"][1]
        assert rank["after"]
        assert rank["policy moved"]


def test_a_frozen_copy_of_an_adapter_in_parts_is_refused(tmp_path: Path) -> None:
    asked = groups(str(tiny_checkpoint(tmp_path / "model", "llama")))["adapter off"]
    asked["models"]["reference"]["frozen_copy"] = True
    for rank in run_on_ranks(many, grouped, {"copy": asked}, timeout=120):
        assert "is partitioned over the ranks, and cannot be copied as it is" in rank["copy"]
