"""examples/deepspeed_chat_sft.yaml loads what step 1 of DeepSpeed-Chat trains.

What its create_hf_model does is written down here from DeepSpeedExamples 45b4b715. Steps 2 and 3
need the distribution llmload-rlhf and are tested there.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import recipe, stored
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmload
from llmload.hf import installed_transformers
from llmload.testing import SENTENCES, parameters, same, tiny_checkpoint, trainable

MODEL = "facebook/opt-1.3b"


def create_hf_model(folder: Path, tokenizer: Any) -> Any:
    """Load in float32, say which id ends a text, and round the rows up to a multiple of eight."""
    options = installed_transformers().dtype_option(torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    model.config.end_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.config.eos_token_id
    model.resize_token_embeddings(8 * math.ceil(len(tokenizer) / 8.0))
    return model


@pytest.fixture(scope="module", params=[128, 51], ids=["rows to spare", "rows missing"])
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, llmload.LoadResult, Any, Any]:
    """Folder, what llmload makes of it, and DeepSpeed-Chat's model and tokenizer."""
    folder = tiny_checkpoint(
        tmp_path_factory.mktemp("deepspeed_chat") / "opt",
        "opt",
        dtype=torch.float16,
        pad=True,
        vocab_size=request.param,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    result = llmload.load(recipe("deepspeed_chat_sft", {MODEL: folder}))
    return folder, result, create_hf_model(folder, tokenizer), tokenizer


def test_every_weight_is_deepspeed_chats_but_for_new_rows(loaded: Any) -> None:
    folder, result, theirs, tokenizer = loaded
    kept = min(len(tokenizer), stored(folder)["model.decoder.embed_tokens.weight"].shape[0])
    ours, other = parameters(result.model), parameters(theirs)
    assert ours.keys() == other.keys()
    for name, parameter in ours.items():
        rows = slice(kept) if "embed_tokens" in name or "lm_head" in name else slice(None)
        assert parameter.shape == other[name].shape, name
        assert same(parameter[rows], other[name][rows]), name
    assert ours["lm_head.weight"] is ours["model.decoder.embed_tokens.weight"]


def test_new_rows_are_the_mean_where_deepspeed_chat_draws_them(loaded: Any) -> None:
    folder, result, _, tokenizer = loaded
    rows = stored(folder)["model.decoder.embed_tokens.weight"].float()
    mean = rows[: len(tokenizer)].mean(0)
    held = result.model.get_input_embeddings().weight
    assert len(held) == 56
    new = held[len(rows) :]
    assert len(new) == max(56 - len(rows), 0)
    for row in new:
        torch.testing.assert_close(row, mean)


def test_everything_is_trained_in_float32(loaded: Any) -> None:
    result = loaded[1]
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert trainable(result.model) == set(parameters(result.model))


def test_the_config_says_what_deepspeed_chats_says(loaded: Any) -> None:
    _, result, theirs, _ = loaded
    for field in ("end_token_id", "pad_token_id", "eos_token_id", "bos_token_id", "vocab_size"):
        assert getattr(result.model.config, field) == getattr(theirs.config, field), field
    # Without --dropout the checkpoint's rate stays.
    assert result.model.config.dropout == theirs.config.dropout == 0.1
    assert result.model.model.decoder.layers[0].dropout == 0.1


def test_the_tokenizer_pads_with_eos_on_the_right(loaded: Any) -> None:
    _, result, _, tokenizer = loaded
    texts = list(SENTENCES)
    assert result.tokenizer(texts, padding=True).data == tokenizer(texts, padding=True).data
    assert (result.tokenizer.pad_token_id, result.tokenizer.padding_side) == (2, "right")
