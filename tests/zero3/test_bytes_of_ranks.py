"""Over all ranks each byte is read once, or by whom it has to be, and every loader counts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import IS_MODERN
from zero3.farm import Job, Outcome, launch

from llmload import testing
from llmload.checkpoint import Checkpoint

pytestmark = pytest.mark.slow

CASES: dict[str, dict[str, Any]] = {
    "by slices": {"block": []},
    "from_pretrained": {"block": ["streaming"]},
    "quantised": {"block": [], "kbit": {"bits": 4}},
}
if not IS_MODERN:  # transformers 4.51 refuses bitsandbytes on the CPU
    del CASES["quantised"]

SHARES = {
    "by slices": (0.5, 0.5),
    "from_pretrained": (1, int(not IS_MODERN)),
    "quantised": (0.5, 0.5),
}
"""Part of every weight that each of two ranks reads. from_pretrained has rank 0 read and send, and
in 4.51.3 the others take all out of the file too; what is quantised has statistics over whole
weights, which both read."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("counts")
    sizes = {"hidden_size": 64, "intermediate_size": 160}
    return testing.tiny_llama(made, dtype=torch.bfloat16, shards=2, **sizes)


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, list[Outcome]]:
    jobs = {n: Job("zero3.counting:load", {"folder": str(folder)} | c) for n, c in CASES.items()}
    return dict(zip(jobs, launch(list(jobs.values()), timeout=200), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_each_rank_counts_its_part_of_every_file(
    outcomes: dict[str, list[Outcome]], folder: Path, case: str
) -> None:
    tensors = Checkpoint.open(folder).tensors.values()
    for outcome, share in zip(outcomes[case], SHARES[case], strict=True):
        assert outcome.code == 0, outcome.output
        assert outcome.result["loader"] == ("zero3" if case == "from_pretrained" else "streaming")
        expected = dict.fromkeys(outcome.result["files"], 0.0)
        for tensor in tensors:
            whole = case == "quantised" and "_proj." in tensor.name
            expected[tensor.file.name] += tensor.nbytes * (1 if whole else share)
        assert len(expected) > 1
        found = outcome.result["files"].items()
        assert {name: file["bytes_read"] for name, file in found} == expected
