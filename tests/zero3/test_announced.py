"""``TrainingArguments(deepspeed=...)`` before or after the load, on two ranks: one config."""

from __future__ import annotations

from typing import Any

import pytest
from zero3.farm import Job, Outcome, launch

from llmload import testing

THRESHOLD = {"stage3_param_persistence_threshold": 0}
CASES: dict[str, dict[str, Any]] = {
    "without the section": {"order": "before"},
    "with the section": {"order": "before", "spec": {"zero3": {}}},
    "section before arguments": {"order": "after", "spec": {"zero3": {}}},
    "adapter without the section": {"order": "before", "spec": {"lora": {"r": 2}}},
    "adapter with the section": {"order": "before", "spec": {"lora": {"r": 2}, "zero3": {}}},
    "key that agrees": {"order": "before", "zero": THRESHOLD, "spec": {"zero3": THRESHOLD}},
    "key that differs": {
        "order": "before",
        "zero": THRESHOLD,
        "spec": {"zero3": {"stage3_param_persistence_threshold": 10}},
    },
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    folder = str(testing.tiny_llama(tmp_path_factory.mktemp("announced")))
    jobs = {}
    for name, case in CASES.items():
        place = str(tmp_path_factory.mktemp("script"))
        arguments = {"folder": folder, "place": place, "zero": {}, "spec": {}, **case}
        jobs[name] = Job("zero3.announcing:load", arguments)
    return dict(zip(jobs, launch(list(jobs.values()), timeout=280), strict=True))


def results(ranks: list[Outcome]) -> list[Any]:
    for rank in ranks:
        assert rank.code == 0, rank.output
    return [rank.result for rank in ranks]


LOADED = [name for name in CASES if "differs" not in name]


@pytest.mark.slow
@pytest.mark.parametrize("case", LOADED)
def test_the_order_does_not_matter(outcomes: dict[str, list[Outcome]], case: str) -> None:
    for found in results(outcomes[case]):
        assert found["still set"]
        if "adapter" not in case:  # PEFT's own are partitioned in `initialize`
            assert found["partitioned"]
        with_section = ("section" in case and "without" not in case) or "key" in case
        assert found["loader"] == ("streaming" if with_section else "transformers")
        assert found["parameters"][0] == found["parameters"][1]


@pytest.mark.slow
def test_all_orders_give_the_same_model(outcomes: dict[str, list[Outcome]]) -> None:
    plain = [name for name in LOADED if "adapter" not in name]
    found = [result["digests"] for name in plain for result in results(outcomes[name])]
    assert all(each == found[0] for each in found)


@pytest.mark.slow
def test_what_differs_is_refused_by_its_key(outcomes: dict[str, list[Outcome]]) -> None:
    for found in results(outcomes["key that differs"]):
        assert found["refused"] == (
            "zero3.stage3_param_persistence_threshold: 10 is asked for here, and 0 is asked for in"
            " the DeepSpeed config that is set for transformers already, as"
            " `TrainingArguments(deepspeed=...)` does. Let both say the same of"
            " 'zero_optimization.stage3_param_persistence_threshold', or write `zero3: {}` to take"
            " that config."
        )
