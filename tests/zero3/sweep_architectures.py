"""Every text architecture of transformers under ZeRO-3, on two ranks.

Run by ``nox -s zero3_architectures`` and not with the other tests, as it takes half an hour: parts,
buffers and three training losses of our load are held to those of transformers' own, with one
process group for each part of the list.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
from zero3.farm import Job, launch

PARTS = 12
TYPES = [
    (kind, model_type)
    for kind, types in (
        ("causal_lm", architectures.causal_lm_types()),
        ("seq2seq_lm", architectures.seq2seq_types()),
        ("base", architectures.encoder_types()),
    )
    for model_type in types
]
PRECISIONS = [("bfloat16", None), ("float32", 0)]
"""Dtype of the model, and DeepSpeed's threshold for parameters that persist."""

NOT_COMPARABLE: dict[tuple[str, str], str] = {}
"""Types that transformers cannot load under ZeRO-3, with what it says; ours are the whole model."""

NOT_TRAINED: dict[tuple[str, str], str] = {}
"""Types that DeepSpeed cannot train in bfloat16 or on text alone, with what both models say."""

OTHER_BUFFERS: dict[tuple[str, str], str] = {}
"""Types of which a buffer is float32 with us, as in the whole model, and not with transformers."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("dtype", "threshold"), PRECISIONS)
@pytest.mark.parametrize("part", range(PARTS))
def test_parts_buffers_and_losses_are_those_of_transformers(
    part: int, dtype: str, threshold: int | None, tmp_path: Path
) -> None:
    types = TYPES[part::PARTS]
    common = {"dtype": dtype, "threshold": threshold, "train": True}
    cases = [
        {"kind": kind, "model_type": name, "folder": str(tmp_path / f"{kind}-{name}")} | common
        for kind, name in types
    ]
    job = Job("zero3.comparing:every", {"cases": cases}, timeout=800)
    (ranks,) = launch([job], timeout=850)
    unequal = []
    for rank in ranks:
        assert rank.code == 0, rank.output
        for case, answer in zip(types, rank.result, strict=True):
            if fault := _fault(case, answer, dtype):
                unequal.append(f"{' '.join(case)}: {fault}")
    assert not unequal, "\n".join(unequal)


def _fault(case: tuple[str, str], answer: dict[str, Any], dtype: str) -> str:
    if "error" in answer:
        return str(answer["error"])
    differences = answer["differences"]
    if (case in NOT_COMPARABLE) != ("theirs" in answer):
        return f"transformers: {answer.get('theirs', 'can load it')}"
    if "theirs" in answer:
        said = NOT_COMPARABLE[case]
        return "; ".join(differences) if said in answer["theirs"] else answer["theirs"]
    mine, other = answer["losses"]
    if dtype != "float32" and case in OTHER_BUFFERS:
        ours = {text.partition(" for ")[0] for text in differences}
        if ours and ours <= set(answer["whole"]) and (mine == other or isinstance(other, str)):
            return ""
    if differences:
        return "; ".join(differences)
    if mine != other:
        return f"losses {mine} for {other}"
    if isinstance(mine, str) and not (case in NOT_TRAINED and NOT_TRAINED[case] in mine):
        return f"neither trains: {mine}"
    return ""
