"""Token ids of a model's configs that no row of its embeddings is for: the plan tells of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EncoderDecoderConfig, EncoderDecoderModel

import llmload
from llmload.testing import edit_config, save_checkpoint, tiny_config, tiny_model, tiny_tokenizer


def folder(place: Path, kind: str = "llama", *, tokenizer: bool = False, **ids: Any) -> Path:
    """Save a model of 128 rows whose config has other ids than it was made with."""
    auto_class = "seq2seq_lm" if kind in ("t5", "bart") else "causal_lm"
    found = save_checkpoint(tiny_model(kind, auto_class=auto_class), place / "model")
    if tokenizer:
        tiny_tokenizer(pad=True).save_pretrained(found)
    edit_config(found, **ids)
    return found


def generation(found: Path, **ids: Any) -> Path:
    file = found / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | ids))
    return found


def said(spec: dict[str, Any]) -> list[str]:
    """Return what plan and load say of rows, which is the same."""
    plan, result = llmload.plan(spec), llmload.load(spec)
    words = [str(problem) for problem in plan.warnings if "row" in problem.message]
    assert words == [warning for warning in result.report.warnings if "row" in warning]
    return words


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ({"eos_token_id": 128}, "`eos_token_id: 128`. Write `config: {eos_token_id: null}`"),
        (
            {"eos_token_id": [2, 999]},
            "`eos_token_id: [2, 999]`. Write `config: {eos_token_id: null}`",
        ),
        ({"bos_token_id": -5}, "`bos_token_id: -5`. Write `config: {bos_token_id: null}`"),
        (
            {"bos_token_id": 130, "eos_token_id": 131},
            "`bos_token_id: 130`, `eos_token_id: 131`. Write `config: {bos_token_id: null,"
            " eos_token_id: null}`",
        ),
    ],
)
@pytest.mark.parametrize("blocked", [(), ("tokenizer",)], ids=["", "without the tokenizer plugin"])
def test_an_id_of_the_config_beyond_the_rows_is_told_with_the_way_out(
    ids: dict[str, Any], words: str, blocked: tuple[str, ...], tmp_path: Path
) -> None:
    spec = {"model": str(folder(tmp_path, **ids))}
    plan = llmload.plan(spec, registry=llmload.create_registry(block=set(blocked)))
    assert [str(problem) for problem in plan.warnings] == [
        f"config: the embedding has 128 rows, and none for {words}, or the right ids."
    ]
    assert said(spec | {"config": dict.fromkeys(ids)}) == []


def test_ids_that_a_tokenizer_replaces_are_not_told_and_others_are(tmp_path: Path) -> None:
    found = folder(tmp_path, tokenizer=True, bos_token_id=500, eos_token_id=501)
    assert said({"model": str(found)}) == []
    edit_config(found, eos_token_id=[2, 501])
    (words,) = said({"model": str(found)})
    assert "none for `eos_token_id: [2, 501]`" in words


def test_rows_that_a_plugin_adds_are_counted(tmp_path: Path) -> None:
    found = folder(tmp_path, tokenizer=True, eos_token_id=[2, 200])
    assert len(said({"model": str(found)})) == 1
    assert said({"model": str(found), "embeddings": {"pad_to_multiple_of": 256}}) == []


@pytest.mark.parametrize("attribute", ["decoder_start_token_id", "forced_bos_token_id"])
def test_an_id_of_the_generation_config_is_told(attribute: str, tmp_path: Path) -> None:
    found = generation(folder(tmp_path, "t5"), **{attribute: 500})
    spec = {"model": str(found), "auto_class": "seq2seq_lm"}
    assert said(spec) == [
        f"generation_config: the embedding has 128 rows, and none for `{attribute}: 500`. Mend"
        " generation_config.json."
    ]
    model = llmload.load(spec).model
    with pytest.raises(IndexError):  # this is what it would come to
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)


def test_another_end_of_generation_stays_beside_the_tokenizers_and_is_told(tmp_path: Path) -> None:
    found = generation(folder(tmp_path, tokenizer=True), eos_token_id=999)
    (words,) = said({"model": str(found)})
    assert words.startswith("generation_config: the embedding has 128 rows, and none for `eos_to")


@pytest.mark.filterwarnings("ignore:`pad_token_id` should be positive")  # of transformers 4.51
def test_a_padding_counted_from_the_end_takes_a_row_from_training_and_is_told(
    tmp_path: Path,
) -> None:
    spec = {"model": str(folder(tmp_path, tokenizer=True, pad_token_id=-1))}
    assert said(spec) == [
        "config: the model is built with `pad_token_id: -1`, which torch takes for row 127 of 128:"
        " no training will change that one. Write `config: {pad_token_id: null}`, or the id of the"
        " padding."
    ]
    assert gradient_of_last_row(spec) == 0
    mended = spec | {"config": {"pad_token_id": None}}
    assert said(mended) == []
    assert gradient_of_last_row(mended) > 0


def gradient_of_last_row(spec: dict[str, Any]) -> float:
    model = llmload.load(spec).model
    model.model(torch.tensor([[127, 5]])).last_hidden_state.square().sum().backward()
    return float(model.get_input_embeddings().weight.grad[127].abs().sum())


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_a_padding_beyond_the_rows_is_refused_and_what_the_refusal_says_helps(
    kind: str, tmp_path: Path
) -> None:
    found = folder(tmp_path, kind, pad_token_id=128)
    spec = {"model": str(found), "auto_class": "seq2seq_lm" if kind == "bart" else "causal_lm"}
    words = "Write `config: {pad_token_id: null}`, or the id of the padding: there is no row for"
    with pytest.raises(llmload.RequestError, match=words):
        llmload.plan(spec).raise_for_errors()
    mended = llmload.load(spec | {"config": {"pad_token_id": None}})
    assert mended.model.get_input_embeddings().padding_idx is None


def test_each_part_of_a_composite_config_is_held_to_its_own_rows(tmp_path: Path) -> None:
    encoder, decoder = (tiny_config("bert", vocab_size=size) for size in (96, 64))
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.encoder.sep_token_id = None
    config.decoder.eos_token_id, config.decoder_start_token_id = 80, 70
    config.pad_token_id = config.encoder.bos_token_id = 0
    torch.manual_seed(0)
    found = save_checkpoint(EncoderDecoderModel(config), tmp_path / "model")
    (found / "generation_config.json").unlink(missing_ok=True)
    warnings = llmload.plan({"model": str(found), "auto_class": "seq2seq_lm"}).warnings
    assert [problem.message for problem in warnings] == [
        "the embedding has 64 rows, and none for `decoder_start_token_id: 70`",
        "the embedding has 64 rows, and none for `eos_token_id: 80`",
    ]
    assert warnings[1].fix.startswith("Write `config: {decoder: {eos_token_id: null}}`")
