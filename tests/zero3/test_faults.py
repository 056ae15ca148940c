"""One rank goes wrong: all others stop within the deadline and name it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from zero3.farm import Job, Outcome, launch

DEADLINE = 6.0
SLACK = 4.0
"""Seconds for starting, tracebacks and a machine that does something else."""

FAULTS = [
    ("init_context", "exception", 1),
    ("place", "exception", 0),
    ("place", "exit", 1),
    ("place", "exit", 0),
    ("place", "stop", 1),
    ("post_load", "exception", 1),
    ("post_load", "exit", 1),
    ("post_load", "stop", 1),
    ("post_load", "stop", 0),
]


def sentences(phase: str, kind: str, culprit: int) -> list[str]:
    """What the other rank may say; rank 0 keeps the store here, as no launcher does."""
    if kind == "exception":
        return [f"rank {culprit} failed: LoadFailedError: plugin", "the disk is on fire"]
    if culprit == 0:
        return ["the process that keeps the ranks' common store (rank 0, unless the launcher does)"]
    return [f"rank {culprit} failed: it gave no sign of life for 4.2 s: it ended or hangs"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    folder = str(tiny.tiny_llama(tmp_path_factory.mktemp("model")))
    jobs = {
        f"{phase}-{kind}-{culprit}": Job(
            "zero3.faults:load",
            {
                "folder": folder,
                "phase": phase,
                "kind": kind,
                "culprit": culprit,
                "deadline": DEADLINE,
            },
        )
        for phase, kind, culprit in FAULTS
    }
    common = {"folder": folder, "culprit": 1, "deadline": DEADLINE}
    jobs["stuck"] = Job("zero3.faults:stuck", common)
    jobs["spec"] = Job("zero3.faults:different", common | {"other": {"dropout": {"p": 0.0}}})
    shards = Path(tiny.tiny_llama(tmp_path_factory.mktemp("missing"), shards=2))
    next(shards.glob("*-00001-of-*.safetensors")).unlink()
    jobs["shard"] = Job("zero3.faults:different", common | {"other": {"model": str(shards)}})
    jobs["after"] = Job("zero3.faults:after_a_failure", {"folder": folder})
    return dict(zip(jobs, launch(list(jobs.values()), timeout=280), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "kind", "culprit"), FAULTS)
def test_every_rank_stops_and_names_the_culprit(
    outcomes: dict[str, list[Outcome]], phase: str, kind: str, culprit: int
) -> None:
    ranks = outcomes[f"{phase}-{kind}-{culprit}"]
    survivor = ranks[1 - culprit]
    assert all(rank.code != 0 for rank in ranks)
    assert survivor.code == 1, survivor.output
    for sentence in sentences(phase, kind, culprit):
        assert sentence in survivor.output


@pytest.mark.slow
def test_rank_that_is_stuck_in_a_collective_ends_with_the_reason(
    outcomes: dict[str, list[Outcome]],
) -> None:
    survivor = outcomes["stuck"][0]
    assert survivor.code == 1
    assert (
        "llmload: rank 0 stops: rank 1 failed: it gave no sign of life for 4.2 s: it ended or hangs"
    ) in survivor.output


@pytest.mark.slow
def test_ranks_that_were_asked_for_different_things_say_what_differs(
    outcomes: dict[str, list[Outcome]],
) -> None:
    said = (
        'rank 1 was asked for another load than rank 0: `dropout` is {"p": 0.0} here and absent'
        " there; plugin 'dropout' is llmload 0.1.0 here and absent there"
    )
    for rank in outcomes["spec"]:
        assert rank.code == 1
        assert said in rank.output


@pytest.mark.slow
def test_rank_with_a_missing_shard_stops_the_others(outcomes: dict[str, list[Outcome]]) -> None:
    zero, one = outcomes["shard"]
    assert (zero.code, one.code) == (1, 1)
    assert "CheckpointError" in one.output
    assert "rank 1 failed: it did not come to this load within 4.2 s" in zero.output


@pytest.mark.slow
def test_loads_after_a_failed_one_are_unaffected(outcomes: dict[str, list[Outcome]]) -> None:
    zero, one = outcomes["after"]
    assert zero.code == 0, zero.output
    assert one.code == 0, one.output
    assert zero.result[0].startswith("rank 1 failed: LoadFailedError: plugin 'faulty'")
    assert "the disk is on fire" in one.result[0]
