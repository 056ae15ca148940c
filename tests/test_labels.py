"""How many labels a classifier has, and what they are called: of the config, or of the spec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import refusal
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

import llmload
from llmload.testing import tiny_llama

NAMES = ["bad", "middling", "good"]
CLASSIFIER: dict[str, Any] = {
    "auto_class": "sequence_classification",
    "strict": {"allow_unexpected": ["lm_head"]},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("labels"), pad=True)


def load(folder: Path, **keys: Any) -> llmload.LoadResult:
    return llmload.load({"model": str(folder), **CLASSIFIER, **keys})


@pytest.mark.parametrize("options", [{}, {"plugin": "transformers"}], ids=["streaming", "theirs"])
def test_a_new_head_has_as_many_labels_as_the_spec_says(
    llama: Path, options: dict[str, str]
) -> None:
    registry = llmload.create_registry(block={"streaming"} if options else ())
    spec = {"model": str(llama), **CLASSIFIER, "labels": 3}
    result = llmload.load(spec, registry=registry)
    assert result.plan.errors == []
    assert result.model.score.weight.shape == (3, 16)
    assert result.model.config.num_labels == 3
    new = {"score.weight": "a new head for the labels of the spec"}
    assert result.report.newly_initialised == new
    assert set(result.plan.new_parameters) == set(new)
    assert torch.isfinite(result.model.score.weight).all()


def test_labels_have_names_which_are_saved_with_the_model(llama: Path, tmp_path: Path) -> None:
    model = load(llama, labels=NAMES).model
    model.save_pretrained(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert theirs.config.id2label == dict(enumerate(NAMES))
    assert theirs.config.label2id == {name: number for number, name in enumerate(NAMES)}
    again = load(tmp_path, labels=3)
    assert again.report.newly_initialised == {}
    assert again.model.config.id2label == dict(enumerate(NAMES))
    assert torch.equal(again.model.score.weight, model.score.weight)


def test_a_head_of_another_size_is_refused_in_the_plan(llama: Path, tmp_path: Path) -> None:
    load(llama, labels=3).model.save_pretrained(tmp_path)
    plan = llmload.plan({"model": str(tmp_path), **CLASSIFIER, "labels": 4})
    (problem,) = plan.errors
    assert str(problem).startswith("score.weight: the checkpoint has ")
    assert "(3, 16), the model takes float32 (4, 16)" in str(problem)


def test_an_adapters_head_says_how_many_labels_it_wants(llama: Path, tmp_path: Path) -> None:
    load(llama, labels=3, lora={"r": 2}).model.save_pretrained(tmp_path)
    message = refusal(llama, {"adapter": str(tmp_path)}, **CLASSIFIER)
    assert message.endswith(" Write `labels: 3`, as many as the adapter was trained with.")
    resumed = load(llama, labels=3, lora={"adapter": str(tmp_path)})
    assert resumed.model.get_base_model().score.original_module.out_features == 3


def test_every_part_of_a_head_that_is_new_may_be_missing(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    spec = {
        "model": str(tmp_path),
        "auto_class": "token_classification",
        "labels": ["O", "B", "I"],
        "strict": {"allow_unexpected": ["^cls"]},
    }
    result = llmload.load(spec)
    assert set(result.report.newly_initialised) == {"classifier.weight", "classifier.bias"}
    assert result.model.config.id2label[2] == "I"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"auto_class": "causal_lm", "labels": 2},
            "`labels` belong to a classifier, and `auto_class` is 'causal_lm'. Write `auto_class:"
            " sequence_classification`, or remove `labels`.",
        ),
        (
            {"labels": ["a", "b", "a"]},
            "`labels` has 'a' twice. Give each label a name of its own.",
        ),
    ],
)
def test_labels_that_cannot_be_meant_are_refused(
    llama: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(llmload.SpecError) as caught:
        load(llama, **keys)
    assert str(caught.value).endswith(message)


def test_transformers_own_key_is_answered_with_ours(llama: Path) -> None:
    with pytest.raises(llmload.SpecError) as caught:
        load(llama, num_labels=3)
    assert "`labels: 3`" in str(caught.value)
