"""What a plan says of memory: as many ranks as it takes, and none where they would not do."""

from __future__ import annotations

import re
from typing import Any

import pytest

import llmload
from llmload import Machine, Problem
from llmload.testing import tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", pad=True))


def told(spec: dict[str, Any], **machine: Any) -> list[Problem]:
    plan = llmload.plan(spec, machine=Machine(**machine))
    return [*plan.errors, *plan.warnings]


@pytest.mark.parametrize(
    ("section", "ranks", "offered"),
    [
        (None, 1, r"Load with `parallel: \{\}` on (\d+) ranks\."),
        ({}, 1, r"Load on (\d+) ranks\."),
        ({"fsdp_size": 2}, 2, r"Load on (\d+) ranks, with `fsdp_size: \1`\."),
        ({"dp_replicate_size": 2}, 2, r"Load on (\d+) ranks\."),
    ],
)
def test_as_many_ranks_are_offered_as_do_and_no_more(
    folder: str, section: dict[str, Any] | None, ranks: int, offered: str
) -> None:
    spec = {"model": folder, "dtype": "float16"}
    asked = spec if section is None else spec | {"parallel": section}
    (problem,) = told(asked, device_memory="60kB", ranks=ranks)
    assert problem.message.startswith("a training with adamw_torch_fused takes")
    found = re.search(offered, problem.fix)
    assert found, problem.fix
    enough, copies = int(found[1]), (section or {}).get("dp_replicate_size", 1)
    wider = spec | {"parallel": {"dp_replicate_size": copies}}
    assert told(wider, device_memory="60kB", ranks=enough) == []
    if enough > ranks * 2:
        assert told(wider, device_memory="60kB", ranks=enough // 2) != []


@pytest.mark.parametrize(
    ("keys", "memory"),
    [
        ({"parallel": {}}, "4kB"),  # what is gathered at a time is too much for any number
        ({"device_map": "cpu"}, "60kB"),
    ],
)
def test_no_ranks_are_offered_where_they_would_not_do(
    folder: str, keys: dict[str, Any], memory: str
) -> None:
    (problem,) = told({"model": folder, "dtype": "float16", **keys}, device_memory=memory)
    assert "ranks" not in problem.fix


def test_zero3_is_not_offered_to_what_is_sharded_already(folder: str) -> None:
    spec = {"model": folder, "dtype": "float16", "parallel": {}}
    (problem,) = told(spec, device_memory="60kB")
    assert "zero3" not in problem.fix


def memory(folder: str, dtype: str, **section: Any) -> dict[tuple[str, str], tuple[str, int]]:
    """Return what and when -> place and bytes, of all that is taken beside the weights."""
    machine = Machine(ranks=2, device_memory="1GB", host_memory="1GB")
    plan = llmload.plan({"model": folder, "dtype": dtype, "parallel": section}, machine=machine)
    assert plan.errors == []
    assert plan.memory is not None
    return {(item.what, item.phase): (item.place, item.nbytes) for item in plan.memory.items}


def test_what_is_offloaded_is_foretold_on_the_host_and_what_is_gathered_on_the_accelerator(
    folder: str,
) -> None:
    kept = memory(folder, "bfloat16")
    offloaded = memory(folder, "bfloat16", fsdp_cpu_offload=True)
    assert [nbytes for _, nbytes in kept.values()] == [n for _, n in offloaded.values()]
    moved = {key[0] for key, (place, _) in kept.items() if offloaded[key][0] != place}
    assert moved == {"weights, part", "gradients", "optimizer adamw_torch_fused"}
    assert {offloaded[key][0] for key in kept if key[0] in moved} == {"host"}
    assert {place for (what, _), (place, _) in offloaded.items() if "gathered" in what} == {
        "device"
    }


def test_mixed_precision_gathers_half_as_many_bytes_of_float32(folder: str) -> None:
    usual, mixed = (
        memory(folder, "float32", fsdp_mixed_precision=asked)["gathered weights", "use"]
        for asked in (False, True)
    )
    assert usual == ("device", 2 * mixed[1])
