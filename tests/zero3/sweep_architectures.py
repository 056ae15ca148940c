"""Every text architecture of transformers under ZeRO-3, on two ranks.

Run by ``nox -s zero3_architectures`` and not with the other tests, as it takes 45 minutes: parts,
buffers and three training losses of our load are held to those of transformers' own, with one
process group for each part of the list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import architectures
import pytest
from zero3 import comparing
from zero3.farm import Job, launch

PARTS = 12
TYPES = architectures.every()
PRECISIONS = [("bfloat16", None), ("float32", 0)]
"""Dtype of the model, and DeepSpeed's threshold for parameters that persist."""

NO_SHAPE = "tuple index out of range"
UNPACKED = "not enough values to unpack (expected 2, got 1)"
FAN_IN = "Fan in and fan out can not be computed for tensor with fewer than 2"

NOT_COMPARABLE: dict[tuple[str, str], str] = {
    ("causal_lm", "blt"): NO_SHAPE,
    ("causal_lm", "marian"): UNPACKED,
    ("causal_lm", "pegasus"): UNPACKED,
    ("causal_lm", "roformer"): UNPACKED,
    ("causal_lm", "rwkv"): NO_SHAPE,
    ("causal_lm", "xlstm"): NO_SHAPE,
    ("seq2seq_lm", "fsmt"): "get_embedding() missing 1 required positional argument: 'padding_idx'",
    ("seq2seq_lm", "pegasus"): UNPACKED,
    ("seq2seq_lm", "nemo_speechlm"): "too many indices for tensor of dimension 1",
    ("base", "emu3"): FAN_IN,
    ("base", "funnel"): UNPACKED,
    ("base", "molmo2_text"): "split_with_sizes expects split_sizes to sum exactly to 64",
    ("base", "roformer"): UNPACKED,
}
"""Types that transformers cannot load under ZeRO-3, with what it says; most look at the shapes of
parameters that are empty by then. Ours are the whole model."""

REFORMER = "If you want to train `ReformerModel` and its variations"
NO_START = "object has no attribute 'decoder_start_token_id'"

NOT_TRAINED: dict[tuple[str, str], str] = {
    ("causal_lm", "git"): "Expected input batch_size (0) to match target batch_size (14)",
    ("seq2seq_lm", "encoder-decoder"): "Make sure to set the decoder_start_token_id attribute",
    ("seq2seq_lm", "longt5"): NO_START,
    ("seq2seq_lm", "switch_transformers"): NO_START,
    ("seq2seq_lm", "t5"): NO_START,
    ("causal_lm", "reformer"): REFORMER,
    ("base", "reformer"): REFORMER,
}
"""Types that DeepSpeed cannot train on text alone, with what both models say."""

MIXED = "mixed dtype (CPU): expect parameter to have scalar type of Float"
TWO_DTYPES = "expected m1 and m2 to have the same dtype, but got: float"

NOT_TRAINED_IN_BFLOAT16: dict[tuple[str, str], str] = {
    ("causal_lm", "inkling2_text"): TWO_DTYPES,
    ("base", "fnet"): "Unsupported dtype BFloat16",
    ("base", "mra"): TWO_DTYPES,
}
"""The same, in bfloat16 alone."""

OTHER_BUFFERS: dict[tuple[str, str], tuple[str, str]] = {
    ("causal_lm", "minimax"): ("self_attn.", TWO_DTYPES),
    ("causal_lm", "xglm"): ("embed_positions.weights", MIXED),
    ("causal_lm", "zaya"): ("gate.balancing_biases", ""),
    ("seq2seq_lm", "m2m_100"): ("embed_positions.weights", MIXED),
    ("seq2seq_lm", "nllb-moe"): ("embed_positions.weights", MIXED),
    ("seq2seq_lm", "seamless_m4t"): ("embed_positions.weights", MIXED),
    ("seq2seq_lm", "seamless_m4t_v2"): ("embed_positions.weights", MIXED),
    ("base", "tipsv2_text_model"): ("position_embedding.weights", ""),
}
"""Types with a buffer, by a part of its name, that has another dtype when transformers loads under
ZeRO-3 than in its plain load; ours is that of the plain load. Then what DeepSpeed says where it
cannot train theirs."""

OTHER_BUFFERS_IN_FLOAT32: dict[tuple[str, str], tuple[str, str]] = {
    ("causal_lm", "recurrent_gemma"): ("model.normalizer", "["),
}
"""The same, in float32. What theirs says is a list: it trains, to losses that are a little off."""

LATER_PARTITIONED: dict[tuple[str, str], str] = {
    ("causal_lm", "reformer"): "position_embeddings.weights.",
    ("base", "reformer"): "position_embeddings.weights.",
}
"""Types with parameters in a ParameterList that is filled after it was made: ``zero.Init``
overlooks them, and DeepSpeed partitions them in ``initialize``. Ours are partitioned at once."""


@pytest.fixture(scope="module")
def counts(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """How the comparisons ended; printed when all are done."""
    yield from architectures.counted(request, f"loads of {len(TYPES)} types")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("dtype", "threshold"), PRECISIONS)
@pytest.mark.parametrize("part", range(PARTS))
def test_parts_buffers_and_losses_are_those_of_transformers(
    part: int, dtype: str, threshold: int | None, tmp_path: Path, counts: Counter[str]
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
    for number, rank in enumerate(ranks):
        assert rank.code == 0, rank.output
        for case, answer in zip(types, rank.result, strict=True):
            outcome, fault = judge(case, answer, dtype)
            counts[outcome] += number == 0
            if fault:
                unequal.append(f"{' '.join(case)}: {fault}")
    assert not unequal, "\n".join(unequal)


def judge(case: tuple[str, str], answer: dict[str, Any], dtype: str) -> tuple[str, str]:
    """Return how a comparison ended, and what is wrong: exceptions that no longer hold too."""
    if "error" in answer:
        return "failed", answer["error"]
    differences = answer["differences"]
    if case in NOT_COMPARABLE:
        outcome = "that transformers cannot do, equal to the whole model"
        theirs = answer.get("theirs", "it can be compared now")
        return outcome, "; ".join(differences) if NOT_COMPARABLE[case] in theirs else theirs
    if "theirs" in answer:
        return "failed", f"transformers: {answer['theirs']}"
    outcome, faults = "identical", list(differences)
    buffers = OTHER_BUFFERS_IN_FLOAT32 if dtype == "float32" else OTHER_BUFFERS
    buffer, theirs_says = buffers.get(case, ("", ""))
    if buffer:
        outcome = "identical but for a buffer's dtype, which is that of the plain load"
        faults = [text for text in differences if not _as_in_plain_load(buffer, text, answer)]
        if not differences:
            faults.append(f"no buffer {buffer} differs any more")
    if case in LATER_PARTITIONED:
        outcome = "identical but for a part that DeepSpeed makes in `initialize`"
        late = (comparing.WHOLE, comparing.UNREAD)
        later = [f for f in faults if LATER_PARTITIONED[case] in f and f.endswith(late)]
        faults = [fault for fault in faults if fault not in later]
        if not later:
            faults.append(f"{LATER_PARTITIONED[case]} is partitioned by zero.Init now")
    mine, other = answer["losses"]
    if theirs_says:
        if theirs_says not in str(other):
            faults.append(f"it says {other}")
        other = mine
    untrained = NOT_TRAINED | (NOT_TRAINED_IN_BFLOAT16 if dtype == "bfloat16" else {})
    if case in untrained:
        outcome = "identical, of types that DeepSpeed cannot train"
        faults += [f"it says {text}" for text in (mine, other) if untrained[case] not in str(text)]
    elif mine != other or isinstance(mine, str):
        faults.append(f"losses {mine} for {other}")
    return outcome, "; ".join(faults)


def _as_in_plain_load(buffer: str, difference: str, answer: dict[str, Any]) -> bool:
    """Whether a difference is that of the named buffer, and ours is that of the plain load."""
    ours = difference.partition(" for ")[0]
    return buffer in ours and ours in answer["whole"]
