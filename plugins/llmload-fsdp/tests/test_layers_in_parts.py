"""Tensor and expert parallel: transformers splits while it loads; what comes too late is told."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import layers_in_parts, many, planned

from llmload.testing import run_on_ranks, tiny_checkpoint

ROUNDING = 1e-6
"""Of a sum that two ranks add halves of, at float32, for logits of about 0.1."""
CASES: dict[str, tuple[str, dict[str, int]]] = {
    "llama": ("llama", {"tp_size": 2}),
    "qwen2": ("qwen2", {"tp_size": 2}),
    "mixtral": ("mixtral", {"tp_size": 2}),
    "mixtral's experts": ("mixtral", {"tp_size": 2, "ep_size": 2}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("tiny")
    names = ("llama", "qwen2", "mixtral")
    return {name: str(tiny_checkpoint(place / name, name)) for name in names}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, str]) -> list[dict[str, Any]]:
    asked = {
        case: {"model": folders[name], "parallel": sizes} for case, (name, sizes) in CASES.items()
    }
    return run_on_ranks(many, layers_in_parts, asked, timeout=280)


@pytest.mark.parametrize("case", CASES)
def test_split_layers_hold_slices_of_the_checkpoint_and_compute_the_same(
    loaded: list[dict[str, Any]], case: str
) -> None:
    for rank, found in enumerate(each[case] for each in loaded):
        assert isinstance(found, dict), found
        assert found["as theirs"]
        assert found["unlike"] == []
        assert found["far"] < ROUNDING
        assert found["loader"] == "transformers"
        assert found["report"]["rank"] == rank
        assert "model.layers.0.self_attn.q_proj.weight" in found["split"]
        assert ("ep_plan" in found["report"]) == (CASES[case][1].get("ep_size") == 2)


def test_what_would_come_after_the_split_is_refused_in_the_plan(folders: dict[str, str]) -> None:
    sizes = {"parallel": {"tp_size": 2}}
    asked = {
        "lora": {"model": folders["llama"], "lora": {}, **sizes},
        "embeddings": {"model": folders["llama"], "embeddings": {}, **sizes},
        "kbit": {"model": folders["llama"], "kbit": {"bits": 4}, **sizes},
        "weights": {"model": folders["llama"], "weights": "random", **sizes},
        "experts": {"model": folders["llama"], "parallel": {"tp_size": 2, "ep_size": 2}},
    }
    found = run_on_ranks(many, planned, asked, timeout=280)[0]
    words = "with tensor or expert parallel, "
    assert found["lora"] == [
        f"lora: {words}an adapter put around layers that are split already stays whole on every"
        " rank. Remove `lora`, or shard with `fsdp_size` alone."
    ]
    assert found["embeddings"] == [
        f"embeddings: {words}embeddings that are split already cannot be resized. Remove"
        " `embeddings`, or shard with `fsdp_size` alone."
    ]
    assert found["kbit"] == [
        f"kbit: {words}transformers splits no layer that is quantised. Remove `kbit`, or shard with"
        " `fsdp_size` alone."
    ]
    assert found["weights"] == [
        f"weights: {words}each rank would draw weights of its own. Load a checkpoint, or shard with"
        " `fsdp_size` alone."
    ]
    (experts,) = found["experts"]
    assert experts.startswith(
        "parallel: transformers refuses the plan: `ep_size=2` was requested, but"
        " `LlamaForCausalLM` has no `ep_plan`."
    )
