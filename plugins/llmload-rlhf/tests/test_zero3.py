"""Under ZeRO-3 a head is partitioned like its transformer, and whole again in its system's file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from making import CASES, saved
from zero3.farm import Job, launch

from llmload.testing import tiny_checkpoint

HERE = Path(__file__).parent


def test_heads_are_partitioned_equal_on_all_ranks_and_saved_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    jobs, expected = [], []
    for case in CASES:
        folder, theirs = saved(tmp_path / "-".join(case), case[1])
        jobs.append(Job("ranks:load_and_save", {"folder": str(folder), "case": case, "new": False}))
        expected.append(theirs.state_dict())
    causal = tiny_checkpoint(tmp_path / "causal", "llama", pad=True)
    new = {"folder": str(causal), "case": ("reward_head", "coati"), "new": True}
    for job, ranks in zip(
        [*jobs, Job("ranks:load_and_save", new)],
        launch([*jobs, Job("ranks:load_and_save", new)], timeout=250),
        strict=True,
    ):
        for rank in ranks:
            assert rank.code == 0, rank.output
        first, second = (rank.result for rank in ranks)
        assert first["head"] == second["head"]
        assert first["partitioned"] == second["partitioned"] == first["parameters"]
        if not job.args["new"]:
            wanted = expected[jobs.index(job)]
            found = torch.load(first["whole"], weights_only=True)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(value, wanted[name]) for name, value in found.items())
