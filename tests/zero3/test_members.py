"""Groups whose members differ in their parallel scope, on two ranks."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import tiny
import torch
from zero3.farm import Job, Outcome, launch

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


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = str(tiny.tiny_llama(tmp_path_factory.mktemp("members"), dtype=torch.bfloat16))
    jobs = {
        name: Job("zero3.grouping:train_policy", {"folder": folder, **case})
        for name, case in CASES.items()
    }
    jobs |= {
        f"view-{dtype}": Job("zero3.grouping:view", {"folder": folder, "dtype": dtype})
        for dtype in ("float32", "bfloat16")
    }
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
        assert answer["message"] == (
            "models.reference: plugin 'failing' (given as an object) failed in init_context:"
            " RuntimeError: no"
        )
        assert answer["as before"]
