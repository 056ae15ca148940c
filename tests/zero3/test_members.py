"""Groups whose members differ in their parallel scope, on two ranks."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from zero3.farm import Job, Outcome, launch

from llmload import testing

CASES = {
    f"{partitioned}-{dtype}-{'lora' if lora else 'full'}": {
        "partitioned": partitioned,
        "dtype": dtype,
        "lora": lora,
    }
    for partitioned, dtype, lora in product(
        ("policy", "reference"), ("float32", "bfloat16"), (True, False)
    )
}


DEADLINE = 6.0
ALONE = list(product(("policy", "reference"), ("exception", "exit"), (0, 1)))
"""The member that is loaded first, what goes wrong in the whole one, and on which rank."""
PREFIX = {"policy": "", "reference": "models.policy: "}
"""Where the others learn of it: at the end of the group, or where they agree on the policy."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = str(testing.tiny_llama(tmp_path_factory.mktemp("members"), dtype=torch.bfloat16))
    jobs = {
        name: Job("zero3.grouping:train_policy", {"folder": folder, **case})
        for name, case in CASES.items()
    }
    jobs |= {
        f"view-{dtype}": Job("zero3.grouping:view", {"folder": folder, "dtype": dtype})
        for dtype in ("float32", "bfloat16")
    }
    jobs["two partitioned"] = Job("zero3.grouping:two_partitioned", {"folder": folder})
    jobs |= {
        one: Job(
            "zero3.grouping:one_fails",
            {"folder": folder, "deadline": DEADLINE}
            | dict(zip(("first", "kind", "culprit"), one, strict=True)),
        )
        for one in ALONE
    }
    slow = {"first": "policy", "kind": "exception", "culprit": 1, "seconds": 30.0}
    jobs["while another loads"] = Job(
        "zero3.grouping:one_fails", {"folder": folder, "deadline": DEADLINE} | slow
    )
    jobs["second fails"] = Job("zero3.grouping:second_fails", {"folder": folder})
    return dict(zip(jobs, launch(list(jobs.values()), timeout=280), strict=True))


def results(ranks: list[Outcome]) -> list[Any]:
    for rank in ranks:
        assert rank.code == 0, rank.output
    return [rank.result for rank in ranks]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_only_the_member_that_asks_for_it_is_partitioned_and_no_step_reaches_the_reference(
    outcomes: dict[str, list[Outcome]], case: str
) -> None:
    for answer in results(outcomes[case]):
        assert answer["partitioned"] == [CASES[case]["partitioned"]]
        assert answer["losses"] == sorted(answer["losses"], reverse=True)
        assert answer["unchanged"]
        assert answer["as the whole"]
        assert answer["frozen"]
        assert not answer["zero3 is still on"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_view_of_a_partitioned_policy_is_the_whole_model_at_every_step(
    outcomes: dict[str, list[Outcome]], dtype: str
) -> None:
    for answer in results(outcomes[f"view-{dtype}"]):
        assert answer["losses"] == sorted(answer["losses"], reverse=True)
        assert all(answer["as the whole"])


@pytest.mark.slow
def test_where_the_second_member_fails_the_first_ones_traces_are_gone_too(
    outcomes: dict[str, list[Outcome]],
) -> None:
    for answer in results(outcomes["second fails"]):
        # Either rank's word: both fail, and each may hear of the other before it has its say.
        assert answer["message"].endswith(
            "models.reference: plugin 'failing' (given as an object) failed in init_context:"
            " RuntimeError: no"
        )
        assert answer["as before"]


@pytest.mark.slow
def test_two_partitioned_members_agree_one_after_the_other(
    outcomes: dict[str, list[Outcome]],
) -> None:
    for answer in results(outcomes["two partitioned"]):
        assert answer == {"partitioned": ["policy", "reference"], "as the whole": True}


@pytest.mark.slow
@pytest.mark.parametrize(("first", "kind", "culprit"), ALONE)
def test_a_rank_that_fails_alone_in_a_whole_member_stops_the_others(
    outcomes: dict[Any, list[Outcome]], first: str, kind: str, culprit: int
) -> None:
    found = outcomes[first, kind, culprit]
    survivor = found[1 - culprit]
    own = (
        "models.reference: plugin 'failing' (given as an object) failed in post_load:"
        " RuntimeError: the disk is on fire"
    )
    if kind == "exception":
        assert [rank.code for rank in found] == [0, 0], survivor.output
        assert found[culprit].result["message"] == own
        said = survivor.result["message"]
        assert said == f"{PREFIX[first]}rank {culprit} failed: LoadFailedError: {own}"
        assert survivor.result["seconds"] < 30
    else:
        assert found[culprit].code == 3
        assert survivor.code in (0, 1), survivor.output  # 1: it was stuck, and said why
        said = survivor.result["message"] if survivor.code == 0 else survivor.output
        if culprit == 0:  # which keeps the store
            assert "the process that keeps the ranks' common store" in said
        else:
            assert f"rank {culprit} failed: it " in said


@pytest.mark.slow
def test_a_rank_that_is_still_loading_its_whole_member_is_ended_and_says_why(
    outcomes: dict[Any, list[Outcome]],
) -> None:
    """Nothing asks it meanwhile whether it should go on."""
    survivor, _ = outcomes["while another loads"]
    assert survivor.code == 1
    assert survivor.seconds < 25
    assert (
        "llmload: rank 0 stops: rank 1 failed: LoadFailedError: models.reference: plugin 'failing'"
        " (given as an object) failed in post_load: RuntimeError: the disk is on fire"
    ) in survivor.output
