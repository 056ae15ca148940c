"""Thirteen faults that users of FSDP2 report of loading, each passed or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import faultless, lost_rank, many, without_streaming
from training import saved

import llmload
from llmload.testing import run_on_ranks, tiny_checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def found(place: Path) -> list[dict[str, Any]]:
    """A tied model of an odd vocabulary in half precision, resized, with an adapter."""
    folder = tiny_checkpoint(place / "tied", "gemma2", dtype=torch.bfloat16)
    spec = {
        "model": str(folder),
        "parallel": {},
        "dtype": "bfloat16",
        "tokenizer": {"add_tokens": ["<a>", "<b>", "<c>"]},
        "embeddings": {},
        "lora": {"target_modules": ["q_proj", "v_proj"]},
    }
    return run_on_ranks(faultless, spec, timeout=200)


def test_1_no_rank_holds_the_model(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["whole"] == []
    assert sum(rank["elements"] for rank in found) == found[0]["elements of the model"]


def test_2_where_ranks_cannot_read_their_part_alone_the_plan_warns(place: Path) -> None:
    folder = str(tiny_checkpoint(place / "unread", "llama"))
    random = llmload.plan({"model": folder, "parallel": {}, "weights": "random"}).warnings
    assert [str(warning) for warning in random] == [
        "parallel: every rank builds the whole model and gives away what it does not keep: random"
        " weights are drawn, not read. Load a checkpoint to have each rank read its part."
    ]
    for rank in run_on_ranks(without_streaming, folder, timeout=100):
        assert rank["unlike"] == []
        (warning,) = rank["warnings"]
        assert warning == (
            "parallel: every rank loads all 35,136 bytes and gives away what it does not keep: no"
            " plugin is selected that asks where each weight is stored, as `streaming` does. Save"
            " the checkpoint as safetensors, unquantised, to have each rank read its part."
        )


def test_3_no_rank_holds_nan(found: list[dict[str, Any]]) -> None:
    assert [rank["not finite"] for rank in found] == [[], []]


def test_4_tied_embeddings_stay_tied_while_they_train(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["ties"] == rank["ties there"] != []


def test_5_buffers_that_are_not_saved_have_their_values(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["buffers"] == rank["buffers there"] != {}


def test_6_codes_of_four_bits_are_not_cast(place: Path) -> None:
    folder = tiny_checkpoint(place / "codes", "llama")
    spec = {"model": str(folder), "parallel": {"fsdp_mixed_precision": True}, "kbit": {"bits": 4}}
    (problem,) = llmload.plan(spec | {"dtype": "float32"}).errors
    assert problem.where == "parallel.fsdp_mixed_precision"


def test_7_all_ranks_have_one_adapter(found: list[dict[str, Any]]) -> None:
    first, second = found
    assert first["adapter"] == second["adapter"] != {}
    assert first["adapter"] == first["adapter there"]


def test_8_the_adapter_is_saved_from_all_ranks(place: Path) -> None:
    folder = tiny_checkpoint(place / "saved", "llama")
    for rank in run_on_ranks(_saved, str(folder), str(place / "adapter"), timeout=200):
        assert rank["unlike"] == []


def _saved(folder: str, out: str) -> dict[str, Any]:
    return saved(folder, out, adapter=True)


def test_9_the_frozen_base_keeps_its_dtype(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["frozen dtypes"] == ["torch.bfloat16"]
        assert rank["trained dtypes"] == ["torch.float32"]


def test_10_embeddings_are_resized_before_they_are_sharded(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["rows"] == rank["rows there"]
        assert rank["unlike"] == []


def test_11_a_rank_that_fails_while_others_load_stops_them_at_once(place: Path) -> None:
    folder = tiny_checkpoint(place / "lost", "llama")
    first, second = run_on_ranks(lost_rank, str(folder), timeout=100)
    assert "the disk of this rank is gone" in second
    assert first.startswith("rank 1 failed: LoadFailedError: ")
    assert "the disk of this rank is gone" in first


def test_12_rank_0_reads_no_more_than_its_part(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["bytes read"] == rank["bytes planned"]
    assert found[0]["bytes read"] < 0.51 * found[0]["bytes there"]


def test_13_a_reference_has_the_policys_dtype_and_device(place: Path) -> None:
    folder = tiny_checkpoint(place / "roles", "llama")
    policy = {"model": str(folder), "parallel": {}, "dtype": "bfloat16"}
    group = {"models": {"policy": policy, "reference": {"like": "policy", "trainable": False}}}
    for rank in run_on_ranks(_kinds, group, timeout=200):
        assert rank["policy"] == rank["reference"] == [("torch.bfloat16", "cpu")]


def _kinds(group: dict[str, Any]) -> dict[str, Any]:
    loaded = llmload.load_group(group)
    return {
        name: sorted({(str(p.dtype), p.device.type) for p in loaded[name].model.parameters()})
        for name in loaded
    }


def test_ranks_that_were_asked_for_other_sizes_say_what_differs(place: Path) -> None:
    folder = tiny_checkpoint(place / "other", "llama")
    first, second = run_on_ranks(_asked, str(folder), timeout=100)
    for told in (first, second):
        assert "rank 1 was asked for another load than rank 0: `parallel` is" in told


def _asked(folder: str) -> str:
    offset = 1.0 if torch.distributed.get_rank() else 2.0
    found = many(_load, {"it": {"model": folder, "parallel": {"deadline": 20.0 + offset}}})
    return str(found["it"])


def _load(spec: dict[str, Any]) -> None:
    llmload.load(spec)
