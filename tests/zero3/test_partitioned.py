"""A load under ZeRO-3 on real ranks, held against transformers' own and against the whole model."""

from __future__ import annotations

from typing import Any

import architectures
import pytest
import tiny
from zero3.farm import Job, Outcome, launch

ARCHITECTURES = {
    "llama": "causal_lm",
    "gpt2": "causal_lm",  # tied, Conv1D
    "mixtral": "causal_lm",  # experts converted into one parameter
    "t5": "seq2seq_lm",  # tied three ways
    "bert": "base",
}
BEYOND_TRANSFORMERS = {"marian": "causal_lm", "funnel": "base", "rwkv": "causal_lm"}
"""Architectures that ``from_pretrained`` of 5.23 fails to load under ZeRO-3."""
PRECISIONS = [("bfloat16", None), ("float32", 0)]


def flat(outcomes: list[Outcome]) -> list[Any]:
    for rank in outcomes:
        assert rank.code == 0, rank.output
    return [rank.result for rank in outcomes]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    cases = []
    for model_type, kind in ARCHITECTURES.items():
        folder = tmp_path_factory.mktemp(model_type)
        architectures.build(kind, model_type).save_pretrained(folder)
        for dtype, threshold in PRECISIONS:
            case = {"kind": kind, "folder": str(folder), "dtype": dtype, "threshold": threshold}
            cases.append(case | {"train": kind == "causal_lm"})
    tmp = tmp_path_factory.mktemp("models")
    tied, untied = (
        str(tiny.tiny_llama(tmp, name=str(tied), tied=tied, pad=True)) for tied in (True, False)
    )
    resize = {"dtype": "bfloat16"}
    adapter = {"folder": untied, "dtype": "bfloat16"}
    beyond = []
    for model_type, kind in BEYOND_TRANSFORMERS.items():
        folder = tmp_path_factory.mktemp(model_type)
        architectures.build(kind, model_type).save_pretrained(folder)
        beyond.append({"kind": kind, "folder": str(folder), "dtype": "bfloat16"})
    jobs = {
        "beyond": Job("zero3.comparing:many_unlike_the_whole", {"cases": beyond}),
        "two": Job("zero3.comparing:many", {"cases": cases}, timeout=250),
        "four": Job("zero3.comparing:many", {"cases": cases[:1]}, ranks=4, timeout=100),
        "tied": Job("zero3.finishing:embeddings", {"folder": tied} | resize),
        "untied": Job("zero3.finishing:embeddings", {"folder": untied} | resize),
        "auto": Job("zero3.finishing:lora", adapter | {"adapter_dtype": "auto"}),
        "base": Job("zero3.finishing:lora", adapter | {"adapter_dtype": "base"}),
    }
    return dict(zip(jobs, launch(list(jobs.values()), timeout=280), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["two", "four"])
def test_partitions_buffers_and_losses_are_those_of_transformers(
    outcomes: dict[str, list[Outcome]], ranks: str
) -> None:
    for answers in flat(outcomes[ranks]):
        assert answers
        for answer in answers:
            assert answer.get("differences") == [], answer
            mine, other = answer.get("losses", ([], []))
            assert mine == other


@pytest.mark.slow
def test_architectures_that_transformers_cannot_partition_equal_the_whole_model(
    outcomes: dict[str, list[Outcome]],
) -> None:
    for answers in flat(outcomes["beyond"]):
        assert answers == [[]] * len(BEYOND_TRANSFORMERS)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_embeddings_resized_under_zero3_are_those_of_the_whole_model(
    outcomes: dict[str, list[Outcome]], model: str
) -> None:
    for answer in flat(outcomes[model]):
        assert answer["different"] == []
        assert answer["losses"] == sorted(answer["losses"], reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "dtype"), [("auto", "float32"), ("base", "bfloat16")])
def test_adapter_trains_under_zero3_in_either_dtype(
    outcomes: dict[str, list[Outcome]], adapter: str, dtype: str
) -> None:
    for answer in flat(outcomes[adapter]):
        assert answer["dtypes"] == [f"torch.{dtype}"]
        assert answer["line"] == (
            "trainable params: 2,048 || all params: 10,832 || trainable%: 18.9069"
        )
        assert answer["losses"] == sorted(answer["losses"], reverse=True)
