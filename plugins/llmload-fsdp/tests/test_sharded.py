"""Sharded models are transformers' own bit by bit, and the unsharded model with all around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import beside_unsharded, many, ours_beside_theirs

import llmload
from llmload.testing import run_on_ranks, tiny_checkpoint

ARCHITECTURES = ("llama", "qwen2", "gpt2", "gemma2", "mixtral")
COPIES = {"llama": ("llama", {"parallel": {"dp_replicate_size": 2}})}
"""Two copies of the model, each on two ranks (HSDP)."""
BLOCKS_NOT_IN_THEIR_PLAN = ("gpt2",)
ONE_PARAMETER_FOR_A_TIE = ("gemma2",)
"""transformers makes a unit of the embedding and has its root manage the head's name of it too."""

EVERYWHERE = {"r": 4, "target_modules": "all-linear"}
QUERIES = {"r": 4, "target_modules": ["q_proj"]}
HALF = {"dtype": "bfloat16"}
TOKENS = {"tokenizer": {"add_tokens": ["<a>", "<b>", "<c>"]}, "embeddings": {}}
HEAD = {"allow_unexpected": ["lm_head.weight"], "allow_missing": ["score.weight"]}
KBIT = {"bits": 4, "quant_storage": "bfloat16"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "an adapter": ("llama", {"lora": EVERYWHERE}),
    "an adapter on Conv1D": ("gpt2", {"lora": {"r": 4, "target_modules": ["c_attn"]}}),
    "tokens and an adapter on half precision": ("qwen2", HALF | TOKENS | {"lora": QUERIES}),
    "an adapter on embeddings": ("llama", {"lora": {"target_modules": ["embed_tokens"]}}),
    "tied and resized": ("gemma2", TOKENS),
    "a new head": ("llama", {"auto_class": "sequence_classification", "strict": HEAD}),
    "a module to save": ("llama", HALF | {"lora": QUERIES | {"modules_to_save": ["lm_head"]}}),
    "DoRA, which reads norms of weights": ("llama", {"lora": QUERIES | {"use_dora": True}}),
    "random weights": ("mixtral", {"weights": "random"}),
    "checkpointing": ("llama", {"gradient_checkpointing": {}, "lora": QUERIES}),
    "four bits": ("llama", HALF | {"kbit": KBIT, "lora": EVERYWHERE}),
    "four bits, statistics too": (
        "llama",
        HALF | {"kbit": KBIT | {"double_quant": True}, "lora": QUERIES},
    ),
    "four bits and norms cast": (
        "llama",
        HALF | {"kbit": KBIT | {"prepare": "legacy"}, "lora": QUERIES},
    ),
    "mixed precision": ("llama", {"parallel": {"fsdp_mixed_precision": True}}),
}
OTHERWISE_COMPUTED = ("mixed precision",)
"""Values are equal, losses are of another precision."""


def specs(tmp: Path, cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    folders = {name: tmp / name for name in {architecture for architecture, _ in cases.values()}}
    for name, folder in folders.items():
        tiny_checkpoint(folder, name, pad=True)
    return {
        case: {"model": str(folders[architecture]), "parallel": {}, **keys}
        for case, (architecture, keys) in cases.items()
    }


@pytest.fixture(scope="module", params=[2, 4, "copies"])
def plain(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each architecture loaded by us and by transformers, on every rank."""
    chosen = ARCHITECTURES if request.param == 2 else ("llama", "mixtral")
    cases = COPIES if request.param == "copies" else {name: (name, {}) for name in chosen}
    asked = specs(tmp_path_factory.mktemp("plain"), cases)
    ranks = 2 if request.param == 2 else 4
    return run_on_ranks(many, ours_beside_theirs, asked, ranks=ranks, timeout=280)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shards_buffers_ties_and_losses_are_transformers_own(
    plain: list[dict[str, Any]], architecture: str
) -> None:
    if architecture not in plain[0]:
        pytest.skip("on two ranks only")
    for found in plain:
        ours, theirs = found[architecture]
        for what in ("parameters", "buffers", "ties", "losses"):
            assert ours[what] == theirs[what]
        same = architecture not in BLOCKS_NOT_IN_THEIR_PLAN + ONE_PARAMETER_FOR_A_TIE
        assert (ours["units"] == theirs["units"]) == same


def test_blocks_are_units_where_transformers_plan_has_none(plain: list[dict[str, Any]]) -> None:
    if "gpt2" not in plain[0]:
        pytest.skip("on two ranks only")
    ours, theirs = plain[0]["gpt2"]
    assert theirs["units"] == [""]
    assert ours["units"] == ["", "transformer.h.0", "transformer.h.1"]


def test_each_rank_reads_what_the_plan_says_and_nothing_twice(plain: list[dict[str, Any]]) -> None:
    for found in plain:
        for ours, _ in found.values():
            assert ours["bytes read"] == ours["bytes planned"]
        if "mixtral" not in found:
            continue
        # Merged experts too: each rank reads the rows that it keeps of each of them.
        experts = found["mixtral"][0]
        assert experts["bytes read"] <= 1.05 * experts["bytes there"] / len(plain)


def test_the_plan_foretells_the_bytes_that_a_rank_keeps(plain: list[dict[str, Any]]) -> None:
    for architecture in plain[0]:
        planned = {found[architecture][0]["kept planned"] for found in plain}
        held = [found[architecture][0]["report"]["shard_bytes"] for found in plain]
        assert planned == {max(held)} == {held[0]}


def test_gathered_units_are_foretold_for_ranks_that_are_not_here(tmp_path: Path) -> None:
    """Norm and head stay, then a block, and the next one with a copy; then a unit's gradients."""
    spec = {"model": str(tiny_checkpoint(tmp_path / "llama")), "parallel": {}, "dtype": "float32"}
    made = llmload.plan(spec, machine=llmload.Machine(ranks=4)).memory
    assert made is not None
    rest, block = 4 * (128 * 16 + 16), 4 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 32 * 16 + 2 * 16)
    gathered = {item.phase: item.nbytes for item in made.items if "gathered" in item.what}
    assert gathered == {"use": rest + 3 * block, "train": rest + 5 * block}
    (problem,) = llmload.plan(
        spec | {"parallel": {"fsdp_size": 2}}, machine=llmload.Machine(ranks=4)
    ).errors
    assert problem.where == "parallel.fsdp_size"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each case loaded sharded and whole, on every rank, whose random streams differ."""
    asked = specs(tmp_path_factory.mktemp("finished"), CASES)
    return run_on_ranks(many, beside_unsharded, asked, timeout=280)


@pytest.mark.parametrize("case", CASES)
def test_what_is_around_a_sharded_model_is_inside_its_units_and_equal_on_all_ranks(
    finished: list[dict[str, Any]], case: str
) -> None:
    for found in (each[case] for each in finished):
        assert isinstance(found, dict), found
        assert found["spread"]
        assert found["names"]
        assert found["unlike"] == []
        assert found["statistics"]
        assert found["trainable"]
        assert found["ties"]
        assert found["new"] == found["new there"]
        assert found["kept"] <= found["kept planned"]
        if case not in OTHERWISE_COMPUTED:
            assert found["losses"] == found["losses there"]
            assert found["unlike when trained"] == []


def test_packed_codes_are_equal_on_four_ranks_in_one_copy_and_in_two(tmp_path: Path) -> None:
    architecture, keys = CASES["four bits"]
    copies = keys | {"parallel": {"dp_replicate_size": 2}}
    asked = specs(tmp_path, {"one": (architecture, keys), "two": (architecture, copies)})
    for rank in run_on_ranks(many, beside_unsharded, asked, ranks=4, timeout=280):
        for case, found in rank.items():
            assert isinstance(found, dict), found
            assert found["unlike"] == [], case
            assert found["statistics"]
            assert found["losses"] == found["losses there"]
