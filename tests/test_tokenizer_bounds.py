"""What is read of a tokenizer's files before Rust sees them, and what sound ones have of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from llmload.builtin.tokenizer.serialized import Serialized, piece_lengths, read

GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BERT = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
TEMPLATE = processors.TemplateProcessing(
    single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
)
REPLACED = [normalizers.Replace("``", '"'), normalizers.Replace(" ", "▁")]


def serialized(model: Any, **steps: Any) -> bytes:
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    for name, step in steps.items():
        setattr(tokenizer, name, step)
    return tokenizer.to_str().encode()


WORDS = {"<s>": 0, "</s>": 1, "[CLS]": 2, "[SEP]": 3}
SOUND = {
    "GPT-2": serialized(models.BPE(), pre_tokenizer=GPT2, post_processor=processors.ByteLevel()),
    "BERT": serialized(
        models.WordPiece(WORDS, unk_token="<s>"),
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        post_processor=BERT,
    ),
    "Llama 2": serialized(
        models.BPE(),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), *REPLACED]),
        post_processor=TEMPLATE,
    ),
    "ALBERT": serialized(
        models.Unigram([("<s>", 0.0), ("</s>", 0.0)], unk_id=0),
        normalizer=normalizers.Sequence([*REPLACED, normalizers.NFKD(), normalizers.Lowercase()]),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        post_processor=TEMPLATE,
    ),
}


@pytest.mark.parametrize("data", SOUND.values(), ids=list(SOUND))
def test_tokenizers_as_they_are_used_make_a_text_little_longer(data: bytes) -> None:
    found = read(data)
    assert found.added == ["<s>", "</s>"]
    assert found.growth <= 16


def test_pieces_are_measured_where_the_model_is_unigram() -> None:
    assert read(SOUND["ALBERT"]).pieces == [3, 4]
    assert read(SOUND["Llama 2"]).pieces == []


def test_words_and_merges_are_not_parsed() -> None:
    data = b'{"added_tokens": [{"id": 0, "content": "a"}], "model": {"vocab": {"a": not JSON}}}'
    assert read(data) == Serialized(added=["a"], pieces=[], growth=1.0)


@pytest.mark.parametrize(
    "data",
    [
        b'{"\\u0061dded_tokens": [{"content": "hidden"}]}',
        b'{"added_tokens": [], "added_tokens": [{"content": "hidden"}]}',
        b'{"model": {"added_tokens": []}, "added_tokens": [{"content": "hidden"}]}',
    ],
)
def test_a_list_is_found_however_its_key_is_written(data: bytes) -> None:
    assert read(data).added == ["hidden"]


def test_words_that_are_called_as_a_step_is_are_words() -> None:
    vocabulary = {"normalizer": 1, "added_tokens": 2, '"normalizer": [': 3}
    assert read(json.dumps({"model": {"vocab": vocabulary}}).encode()).growth == 1.0


def test_pieces_of_sentencepiece_are_walked_over() -> None:
    """A ModelProto: two pieces, a float, a number of 64 bits, a varint, another piece, an end."""
    first, second = b"\x0a\x04\x0a\x02ab", b"\x0a\x81\x01" + b"x" * 129
    others = b"\x15abcd" + b"\x11abcdefgh" + b"\x18\x96\x01" + b"\x12\x03abc"
    assert list(piece_lengths(first + second + others + first + b"\x07" + first)) == [4, 129, 4]
    assert list(piece_lengths(b"\x0a")) == [0]
