"""One rank goes wrong: all others stop within the deadline and name it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from zero3.farm import Job, Outcome, launch_once

from llmload import testing

DEADLINE = 6.0
LIMIT = 30.0
"""Seconds for all of it: start, four jobs at once, the deadline, and a machine that does something
else. Ranks that hang are killed after 60."""

KINDS = ("exception", "exit", "stop")
PHASES = ("plan", "init_context", "place", "post_load", "wrap_adapter", "audit")
ROUNDS = int(os.environ.get("LLMLOAD_TEST_FAULTS", "1"))
"""How often the matrix is run: more in ``nox -s long_trust``."""
MATRIX = [
    *((phase, kind, culprit, 2) for phase in PHASES for kind in KINDS for culprit in (0, 1)),
    *(("before zero3", kind, 1, 2) for kind in KINDS),
    ("before zero3", "exception", 0, 2),
    *(
        (phase, "interrupt", culprit, 2)
        for phase in ("plan", "place", "audit")
        for culprit in (0, 1)
    ),
    ("before zero3", "interrupt", 0, 2),
    ("plan", "exception", 2, 4),
    ("place", "exit", 3, 4),
    ("post_load", "stop", 1, 4),
    ("audit", "exception", 0, 4),
]

pytestmark = pytest.mark.slow


def sentences(phase: str, kind: str, culprit: int) -> list[str]:
    """What the other ranks say; rank 0 keeps the store here, as no launcher does."""
    if kind == "exception":
        return [f"rank {culprit} failed: LoadFailedError: plugin", "the disk is on fire"]
    if kind == "interrupt":
        return [f"LoadFailedError: rank {culprit} failed: it was interrupted, as by Ctrl-C"]
    if culprit == 0:
        return [r"process that keeps the ranks' common store \(rank 0, unless the launcher does"]
    # Before the ranks have met, a busy machine may not have heard of it at all.
    missed = "it did not come to this load within 4.2 s: it ended, hangs"
    silent = "it gave no sign of life for 4.2 s: it ended or hangs"
    early = f"|{missed}" if phase in ("plan", "before zero3") else ""
    return [f"rank {culprit} failed: ({silent}{early})"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Outcome]]:
    # Most of them wait for a deadline, so many can wait at the same time.
    return launch_once(
        tmp_path_factory,
        "faults",
        lambda: _jobs(tmp_path_factory),
        timeout=280 * ROUNDS if ROUNDS == 1 else 1200 * ROUNDS,
        at_once=4,
    )


def _jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Job]:
    folder = str(testing.tiny_llama(tmp_path_factory.mktemp("model")))
    jobs: dict[Any, Job] = {
        (phase, kind, culprit, ranks, number): Job(
            "zero3.faults:load",
            {
                "folder": folder,
                "phase": phase,
                "kind": kind,
                "culprit": culprit,
                "deadline": DEADLINE,
            },
            ranks=ranks,
        )
        for phase, kind, culprit, ranks in MATRIX
        for number in range(ROUNDS)
    }
    common = {"folder": folder, "culprit": 1, "deadline": DEADLINE}
    jobs["stuck"] = Job("zero3.faults:stuck", common)
    jobs["spec"] = Job("zero3.faults:different", common | {"other": {"dropout": {"p": 0.0}}})
    jobs["bad spec"] = Job("zero3.faults:different", common | {"other": {"dropout": {"q": 0.0}}})
    jobs["early"] = Job("zero3.faults:early", common)
    for culprit in (0, 1):
        name = f"shard {culprit}"
        shards = Path(testing.tiny_llama(tmp_path_factory.mktemp("missing"), shards=2))
        next(shards.glob("*-00001-of-*.safetensors")).unlink()
        other = {"other": {"model": str(shards)}, "culprit": culprit}
        jobs[name] = Job("zero3.faults:different", common | other)
    for kind in ("exit", "stop", "interrupt"):
        jobs[f"unmet {kind}"] = Job("zero3.faults:unmet", common | {"kind": kind})
    jobs["elsewhere"] = Job("zero3.faults:elsewhere", common)
    jobs["busy"] = Job("zero3.faults:busy", common)
    tuned = str(testing.tiny_llama(tmp_path_factory.mktemp("tuned"), seed=1))
    for name in ("chimera", "digests"):
        job = common | {"other": {"model": tuned}, "digests": name == "digests"}
        jobs[name] = Job("zero3.faults:different", job)
    jobs["after"] = Job("zero3.faults:after_a_failure", {"folder": folder})
    jobs["alternating"] = Job("zero3.faults:alternating", {"folder": folder})
    return jobs


@pytest.mark.parametrize("number", range(ROUNDS))
@pytest.mark.parametrize(("phase", "kind", "culprit", "ranks"), MATRIX)
def test_every_rank_stops_in_time_and_names_the_culprit(
    outcomes: dict[Any, list[Outcome]],
    phase: str,
    kind: str,
    culprit: int,
    ranks: int,
    number: int,
) -> None:
    found = outcomes[phase, kind, culprit, ranks, number]
    assert len(found) == ranks
    assert all(rank.code != 0 for rank in found)
    for number, survivor in enumerate(found):
        if number == culprit:
            continue
        assert survivor.code == 1, survivor.output
        assert survivor.seconds < LIMIT, survivor.output
        for sentence in sentences(phase, kind, culprit):
            assert re.search(sentence, survivor.output), survivor.output


def test_rank_that_is_stuck_in_a_collective_ends_with_the_reason(
    outcomes: dict[Any, list[Outcome]],
) -> None:
    survivor = outcomes["stuck"][0]
    assert survivor.code == 1
    assert (
        "llmload: rank 0 stops: rank 1 failed: it gave no sign of life for 4.2 s: it ended or hangs"
    ) in survivor.output


def test_ranks_that_were_asked_for_different_things_say_what_differs(
    outcomes: dict[Any, list[Outcome]],
) -> None:
    said = (
        'rank 1 was asked for another load than rank 0: `dropout` is {"p": 0.0} here and absent'
        " there; plugin 'dropout' is llmload 0.1.0 here and absent there"
    )
    for rank in outcomes["spec"]:
        assert rank.code == 1
        assert said in rank.output


def test_rank_whose_spec_is_invalid_stops_the_others(outcomes: dict[Any, list[Outcome]]) -> None:
    zero, one = outcomes["bad spec"]
    assert (zero.code, one.code) == (1, 1)
    assert "LoadFailedError: rank 1 failed: SpecError: dropout.q: unknown key" in zero.output


@pytest.mark.parametrize("culprit", [0, 1])
def test_rank_with_a_missing_shard_stops_the_others(
    outcomes: dict[Any, list[Outcome]], culprit: int
) -> None:
    ranks = outcomes[f"shard {culprit}"]
    assert [rank.code for rank in ranks] == [1, 1]
    assert f"LoadFailedError: rank {culprit} failed: CheckpointError: " in ranks[1 - culprit].output
    assert "00001-of-" in ranks[1 - culprit].output


def test_rank_whose_plan_fails_before_the_process_group_exists_stops_the_others(
    outcomes: dict[Any, list[Outcome]],
) -> None:
    zero, one = outcomes["early"]
    assert (zero.code, one.code) == (1, 1)
    assert "LoadFailedError: rank 1 failed: CheckpointError: " in zero.output
    assert "-missing" in zero.output


@pytest.mark.parametrize("kind", ["exit", "stop"])
def test_rank_that_is_lost_before_the_ranks_have_met_is_named(
    outcomes: dict[Any, list[Outcome]], kind: str
) -> None:
    zero, _ = outcomes[f"unmet {kind}"]
    assert zero.code == 1, zero.output
    assert zero.seconds < LIMIT, zero.output
    assert (
        "LoadFailedError: rank 1 gave no sign of life for 4.2 s while it planned: it ended or hangs"
    ) in zero.output


def test_rank_that_is_interrupted_before_the_ranks_have_met_is_named(
    outcomes: dict[Any, list[Outcome]],
) -> None:
    zero, _ = outcomes["unmet interrupt"]
    assert zero.code == 1, zero.output
    assert "LoadFailedError: rank 1 failed: it was interrupted, as by Ctrl-C" in zero.output


def test_rank_whose_spec_is_another_is_named_before_the_ranks_have_met(
    outcomes: dict[Any, list[Outcome]],
) -> None:
    zero, one = outcomes["elsewhere"]
    assert zero.code == 1, zero.output
    assert zero.seconds < LIMIT, zero.output
    assert (
        "LoadFailedError: rank 1 loads something else: its spec is without `zero3`"
    ) in zero.output
    assert (one.code, one.result) == (0, "loaded"), one.output


def test_healthy_rank_that_is_busy_in_a_plugin_is_interrupted_and_not_ended(
    outcomes: dict[Any, list[Outcome]],
) -> None:
    zero, _ = outcomes["busy"]
    assert zero.code == 1, zero.output
    assert "the plugin has tidied up" in zero.output
    assert "LoadFailedError: rank 1 failed: LoadFailedError: plugin 'busy'" in zero.output
    assert "llmload: rank 0 stops" not in zero.output


def test_ranks_whose_weights_differ_under_equal_headers_stop(
    outcomes: dict[Any, list[Outcome]],
) -> None:
    for name, what in (("chimera", "a sample of the weights"), ("digests", "the content of model")):
        for rank in outcomes[name]:
            assert rank.code == 1, rank.output
            assert f"rank 1 was asked for another load than rank 0: {what}" in rank.output


def test_loads_after_a_failed_one_are_unaffected(outcomes: dict[Any, list[Outcome]]) -> None:
    zero, one = outcomes["after"]
    assert zero.code == 0, zero.output
    assert one.code == 0, one.output
    assert len(zero.result) == len(one.result) == 3
    for theirs, mine in zip(zero.result, one.result, strict=True):
        assert theirs.startswith("rank 1 failed: LoadFailedError: plugin 'faulty'")
        assert "the disk is on fire" in mine


def test_whole_models_between_partitioned_ones_stay_whole(
    outcomes: dict[Any, list[Outcome]],
) -> None:
    for rank in outcomes["alternating"]:
        assert rank.code == 0, rank.output
        first, whole, other, last = rank.result
        assert (whole, other) == ("whole, by streaming", "whole, by transformers")
        assert first == last
