"""Parity with DeepSpeed-Chat's ``create_hf_model`` at stage 3, on two ranks.

Named differences: new embedding rows are the mean of the known ones where transformers draws about
it; the random weights that ``rlhf_training`` starts from are initialised, and not whatever was in
memory.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zero3.farm import Job, Outcome, launch_once

from llmload import testing

pytestmark = pytest.mark.slow

VOCABULARIES = {"grown": -3, "cut": 40}
"""Rows of the checkpoint's embedding beyond the tokens of its tokenizer."""
CASES = [
    (change, training, dropout)
    for change, training, dropout in (
        ("grown", False, 0.0),
        ("grown", True, 0.25),
        ("cut", False, 0.25),
        ("cut", True, 0.0),
    )
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Outcome]]:
    return launch_once(tmp_path_factory, "chat", lambda: _jobs(tmp_path_factory), timeout=200)


def _jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Job]:
    tmp = tmp_path_factory.mktemp("chat")
    tokens = len(testing.tiny_tokenizer())
    jobs = {}
    for change, training, dropout in CASES:
        rows = tokens + VOCABULARIES[change]
        folder = testing.tiny_checkpoint(tmp / f"{change}-{training}", "opt", vocab_size=rows)
        saved = tmp / f"{change}-{training}.bin"
        trained = testing.tiny_model("opt", vocab_size=-(-tokens // 8) * 8, seed=3)
        torch.save(trained.state_dict(), saved)
        args = {"folder": str(folder), "saved": str(saved)}
        jobs[change, training, dropout] = Job(
            "zero3.deepspeed_chat:compare", args | {"rlhf_training": training, "dropout": dropout}
        )
    return jobs


@pytest.mark.parametrize(("change", "training", "dropout"), CASES)
def test_model_is_the_one_that_deepspeed_chat_makes(
    outcomes: dict[Any, list[Outcome]], change: str, training: bool, dropout: float
) -> None:
    for rank in outcomes[change, training, dropout]:
        assert rank.code == 0, rank.output
        found = rank.result
        rows = -(-found["tokens"] // 8) * 8
        assert (found["known"] < rows) == (change == "grown")
        assert set(map(tuple, found["rows"].values())) == {(rows, rows)}
        assert found["vocabulary"] == [rows, rows]
        assert found["different"] == []
        assert found["equal_ranks"]
        assert found["padded"] == found["ends"] == [2, 2]
        mine, other = found["dropout"]
        assert {mine[key] for key in ("dropout", "attention_dropout")} == {dropout}
        # What it leaves at another value in a module, we set too.
        assert {name: p for name, p in mine.items() if p != other.get(name)} == {}
        mine, other = found.get("losses", ([], []))
        assert mine == other
        assert len(mine) == (3 if training and not dropout else 0)
