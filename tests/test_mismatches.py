"""Weights that do not fit the model are refused in the same words, whatever else a spec asks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stacks import NO_BITSANDBYTES

import llmload
from llmload.errors import RequestError
from llmload.testing import tiny_llama

Weights = dict[str, torch.Tensor]
NORM, HEAD, DOWN = "model.norm.weight", "lm_head.weight", "model.layers.0.mlp.down_proj.weight"


def shaped(name: str, *shape: int) -> Callable[[Weights], object]:
    return lambda weights: weights.update({name: torch.ones(shape)})


def of(name: str, dtype: torch.dtype) -> Callable[[Weights], object]:
    return lambda weights: weights.update({name: weights[name].to(dtype)})


DAMAGE: dict[str, Callable[[Weights], object]] = {
    "one longer": shaped(NORM, 17),
    "one shorter": shaped(NORM, 15),
    "empty": shaped(NORM, 0),
    "a scalar": shaped(NORM),
    "a dimension more": shaped(NORM, 1, 16),
    "transposed": lambda weights: weights.update({DOWN: weights[DOWN].T.contiguous()}),
    "more rows": shaped(HEAD, 256, 16),
    "integers": of(NORM, torch.int32),
    "booleans": of(HEAD, torch.bool),
    "missing": lambda weights: weights.pop(DOWN),
    "one too many": lambda weights: weights.update({"model.extra": torch.ones(2)}),
    "renamed": lambda weights: weights.update({"model.Norm.weight": weights.pop(NORM)}),
}
PLUGINS: dict[str, dict[str, Any]] = {
    "streaming": {},
    "transformers": {},
    "lora": {"lora": {"r": 2, "target_modules": ["q_proj"]}},
    "zero3": {"zero3": {"config": {"zero_optimization": {"stage": 3}}}},
    "gradient_checkpointing": {"gradient_checkpointing": {}},
    "embeddings": {"embeddings": {"pad_to_multiple_of": 8}},
}
if not NO_BITSANDBYTES:
    PLUGINS["kbit"] = {"kbit": {"bits": 4}}


@pytest.mark.parametrize("damage", DAMAGE)
def test_weights_that_do_not_fit_are_refused_in_the_same_words_by_every_plugin(
    damage: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = tiny_llama(tmp_path)
    weights = load_file(folder / "model.safetensors")
    DAMAGE[damage](weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    said = {name: refusal(folder, name) for name in PLUGINS}
    assert len(set(said.values())) == 1, said
    record_property("figure", f"{damage}: the same on {len(said)} plugins")


def refusal(folder: Path, plugin: str) -> tuple[type[RequestError], str]:
    registry = llmload.create_registry(select=["no:streaming"] if plugin == "transformers" else [])
    with pytest.raises(RequestError) as caught:
        llmload.load({"model": str(folder), **PLUGINS[plugin]}, registry=registry)
    return type(caught.value), str(caught.value)
