"""Under ZeRO-3 a head is partitioned like its transformer, and whole again in its system's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from making import CASES, saved
from ranks import load_and_save
from test_factors import RANK, adapted

from llmload.testing import run_on_ranks, tiny_checkpoint

pytest.importorskip("deepspeed")


def on_two_ranks(folder: Path, case: tuple[str, str], *, new: bool, **keys: Any) -> dict[str, Any]:
    """Load and save on two ranks, which must agree on the head and on what is partitioned."""
    first, second = run_on_ranks(load_and_save, str(folder), case, new, keys, process_group=False)
    assert first["head"] == second["head"]
    assert first["partitioned"] == second["partitioned"] == first["parameters"]
    return first


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_head_is_partitioned_equal_on_all_ranks_and_saved_whole(
    tmp_path: Path, case: tuple[str, str]
) -> None:
    folder, theirs = saved(tmp_path / "model", case[1])
    found = torch.load(on_two_ranks(folder, case, new=False)["whole"], weights_only=True)
    wanted = theirs.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


def test_old_coatis_factors_are_merged_into_partitioned_weights(tmp_path: Path) -> None:
    folder, theirs = adapted(tmp_path / "model", "critic_head")
    case = ("critic_head", "coati")
    path = on_two_ranks(folder, case, new=False, head_version="0.2.8")["whole"]
    found, state = torch.load(path, weights_only=True), theirs.state_dict()
    for name, value in found.items():
        wanted, stem = state[name], name.removesuffix(".weight")
        if f"{stem}.lora_A" in state:
            wanted = wanted + (state[f"{stem}.lora_B"] @ state[f"{stem}.lora_A"]) * (1 / RANK)
        assert torch.equal(value, wanted), name


def test_a_new_head_is_one_and_the_same_on_all_ranks(tmp_path: Path) -> None:
    causal = tiny_checkpoint(tmp_path / "causal", "llama", pad=True)
    on_two_ranks(causal, ("reward_head", "coati"), new=True)
