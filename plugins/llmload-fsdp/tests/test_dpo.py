"""TRL's DPOTrainer takes the members of a group: a sharded policy and each kind of reference."""

from __future__ import annotations

from typing import Any

import pytest
from training import by_dpo

from llmload.testing import run_on_ranks, tiny_checkpoint

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    place = tmp_path_factory.mktemp("dpo")
    folder = tiny_checkpoint(place / "model", "llama")
    return run_on_ranks(by_dpo, str(folder), str(place), timeout=280)


@pytest.mark.parametrize("way", ["both sharded", "a whole reference"])
def test_a_policy_is_trained_to_the_losses_of_models_that_transformers_has_sharded(
    found: list[dict[str, Any]], way: str
) -> None:
    for rank in found:
        assert rank[way]["losses"] == rank["theirs"]["losses"]
        assert rank[way]["losses"] == sorted(rank[way]["losses"], reverse=True)


@pytest.mark.parametrize("way", ["both sharded", "a whole reference", "adapter off"])
def test_a_policy_starts_from_its_reference_and_is_saved_whole(
    found: list[dict[str, Any]], way: str
) -> None:
    for rank in found:
        first, *_, last = rank[way]["losses"]
        assert first == pytest.approx(0.6931, abs=1e-4)  # log 2: both models are the same
        assert last < first
        assert rank[way]["unlike"] == []
