"""The plugin that docs/plugins.md shows for ZeRO-3 keeps the contract, whole and partitioned."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from snippets import ROOT, blocks

import llmload
from llmload.testing import assert_plugin, run_on_ranks, tiny_llama

PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
ZERO3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


@pytest.fixture
def scaled_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (source,) = (b.text for b in blocks(PAGE) if b.options.get("title") == "scaled_norm.py")
    (tmp_path / "scaled_norm.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module("scaled_norm").ScaledNorm


def gathered_norm(plugin: Any, spec: dict[str, Any]) -> list[float]:
    from llmload.plugin import partitions

    model = llmload.load(spec, registry=llmload.create_registry([plugin])).model
    norm = model.model.norm.weight
    assert partitions.is_partitioned(norm)
    with partitions.whole([norm]):
        return list(norm.tolist())


def test_the_plugin_shown_for_zero3_keeps_the_contract(scaled_norm: Any) -> None:
    assert_plugin(scaled_norm, bad=[{"by": "twice"}])


def test_the_plugin_shown_for_zero3_scales_what_is_in_parts(
    scaled_norm: Any, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    folder = tiny_llama(tmp_path)
    spec = {"model": str(folder), "scaled_norm": {"by": 3.0}, "zero3": {"config": ZERO3}}
    found = run_on_ranks(gathered_norm, scaled_norm, spec, process_group=False)
    stored = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert found == [(stored * 3).tolist()] * 2
