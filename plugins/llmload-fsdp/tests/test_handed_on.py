"""A sharded model is what others take: saved whole, trained by their trainers, generating."""

from __future__ import annotations

from typing import Any

import pytest
import training

from llmload.testing import run_on_ranks, tiny_checkpoint

pytest.importorskip("trl")


def everything(folder: str, out: str) -> dict[str, Any]:
    """Run all of it on one rank of a group, one after the other."""
    kinds = {"adapter": True, "all": False}
    ways = {"plain": training.saved, "trainer": training.by_trainer, "trl": training.by_trl}
    found: dict[str, Any] = {
        f"{way} {kind}": function(folder, f"{out}/{way}-{kind}", adapter=adapter)
        for kind, adapter in kinds.items()
        for way, function in ways.items()
    }
    found["accelerate"] = training.by_accelerate(folder)
    found["generate"] = training.generated(folder)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    place = tmp_path_factory.mktemp("handed-on")
    folder = tiny_checkpoint(place / "model", "llama")
    return run_on_ranks(everything, str(folder), str(place), timeout=280)


@pytest.mark.parametrize("kind", ["adapter", "all"])
@pytest.mark.parametrize("way", ["plain", "trainer", "trl"])
def test_what_was_trained_is_saved_whole_and_loads_unsharded_bit_by_bit(
    found: list[dict[str, Any]], way: str, kind: str
) -> None:
    first, second = (rank[f"{way} {kind}"] for rank in found)
    assert first["losses"] == second["losses"]
    assert first["losses"][0] > first["losses"][-1]
    assert first["unlike"] == second["unlike"] == []


def test_every_trainer_trains_all_of_an_adapter_and_all_of_a_model(
    found: list[dict[str, Any]],
) -> None:
    for way in ("trainer", "trl"):
        assert (
            found[0][f"{way} adapter"]["moved"] >= 14
        )  # each second factor; the first ones move from the second step on
        assert found[0][f"{way} all"]["moved"] == 21


def test_accelerate_leaves_a_sharded_model_alone(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["accelerate"]["itself"]
        assert rank["accelerate"]["as it was"]


def test_a_sharded_model_generates_and_runs_without_its_adapter(
    found: list[dict[str, Any]],
) -> None:
    for rank in found:
        assert rank["generate"]["tokens"]
        assert rank["generate"]["logits"]
