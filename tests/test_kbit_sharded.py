"""QLoRA over several ranks: partitioned by ZeRO-3 while it loads, and ready for FSDP to shard."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantised import load
from stacks import needs_bitsandbytes
from zero3.farm import Job, Outcome, launch

from llmload.testing import tiny_checkpoint

pytestmark = [pytest.mark.slow, needs_bitsandbytes]

ZERO3: dict[str, dict[str, Any]] = {
    "as the model's dtype": {"storage": None},
    "as bytes": {"storage": "uint8"},
    "in host memory": {"offload": "cpu"},
    "by from_pretrained": {"block": True},
    "on three ranks": {},
    "from the cache": {},
    "with an empty cache": {},
}
USUAL = {"storage": None, "offload": None, "block": False, "cache": None}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank of each job returned."""
    folder = tiny_checkpoint(
        tmp_path_factory.mktemp("sharded") / "llama",
        dtype=torch.bfloat16,
        hidden_size=64,
        intermediate_size=160,
        num_attention_heads=4,
    )
    jobs = {
        name: Job("sharded:zero3", USUAL | changes | {"folder": str(folder)})
        for name, changes in ZERO3.items()
    }
    jobs["on three ranks"].ranks = 3
    # Filled by one process, with bytes as storage, for ranks that store as bfloat16.
    full, empty = (tmp_path_factory.mktemp("cache") / name for name in ("full", "empty"))
    load(folder, {"double_quant": True, "cache": {"folder": str(full)}})
    for name, place in (("from the cache", full), ("with an empty cache", empty)):
        jobs[name].args["cache"] = str(place)
    jobs["refused"] = Job("sharded:zero3_refusals", {"folder": str(folder)}, ranks=1)
    for version in (1, 2):
        jobs[f"fsdp {version}"] = Job("sharded:fsdp", {"folder": str(folder), "version": version})
    found: list[list[Outcome]] = launch(list(jobs.values()), timeout=280)
    for ranks in found:
        for rank in ranks:
            assert rank.code == 0, rank.output
    return {name: [rank.result for rank in ranks] for name, ranks in zip(jobs, found, strict=True)}


@pytest.mark.parametrize("name", ZERO3)
def test_a_model_partitioned_by_zero3_trains_as_transformers_and_peft_have_it(
    outcomes: dict[str, list[Any]], name: str
) -> None:
    """Parts of the codes, all statistics and three losses, bit by bit.

    transformers 5.23 loads the whole quantised model on every rank, and DeepSpeed partitions it in
    ``initialize``. The linear function that DeepSpeed puts in place holds for both sides.
    """
    for answer in outcomes[name]:
        assert answer["different"] == []
        mine, other = answer["losses"]
        assert mine == other
        assert mine == sorted(mine, reverse=True)
        assert answer["line"] == (
            "trainable params: 8,960 || all params: 111,680 || trainable%: 8.0229"
        )


@pytest.mark.parametrize("name", ZERO3)
def test_each_rank_keeps_its_part_of_the_codes(outcomes: dict[str, list[Any]], name: str) -> None:
    ranks = outcomes[name]
    codes = ranks[0]["planned"]["bytes"]
    assert codes == 86016 // 2
    if name == "by from_pretrained":
        # DeepSpeed partitions it in `initialize`.
        assert {answer["loader"] for answer in ranks} == {"zero3"}
        assert [answer["held"] for answer in ranks] == [codes] * 2
        return
    assert {answer["loader"] for answer in ranks} == {"streaming"}
    held = [answer["held"] for answer in ranks]
    assert sum(held) == codes
    assert max(held) - codes / len(ranks) < 64
    for answer in ranks:
        assert answer["facts"] == answer["planned"] | {"proven_layers": 14}


def test_ranks_take_their_parts_from_the_cache_and_add_nothing_to_it(
    outcomes: dict[str, list[Any]],
) -> None:
    for answer in outcomes["from the cache"]:
        assert answer["cache"]["outcome"] == "found"
        assert answer["quantised"] is None
    warned = (
        "kbit.cache: each process keeps a part of the weights, so that what is kept is taken, and"
        " nothing is added. Fill the cache beforehand by one process, with the same `kbit` and"
        " without the section that splits."
    )
    for answer in outcomes["with an empty cache"]:
        assert answer["cache"]["outcome"] == "not kept"
        assert answer["quantised"] is not None
        assert warned in answer["warnings"]


def test_what_zero3_cannot_have_is_refused_with_the_reason(outcomes: dict[str, list[Any]]) -> None:
    (refused,) = outcomes["refused"]
    way_out = "Leave `prepare` and `cast` out, or use a ZeRO stage below 3."
    assert refused == [
        [
            "kbit.bits: `zero3` cannot split 8-bit weights: bitsandbytes keeps the whole codes"
            " in the layer, beside the parameter. Use `bits: 4`, or keep the whole model in each"
            " process, as ZeRO does below stage 3."
        ],
        [
            "kbit.quant_storage: DeepSpeed casts every floating-point parameter to bfloat16, codes"
            " stored as float16 too, which ruins them. Remove the key, or set `quant_storage:"
            " bfloat16`."
        ],
        [
            "kbit: ZeRO-3 keeps every parameter in bfloat16, and embeddings and head and norms"
            f" would be cast to another dtype. {way_out}"
        ],
        [
            "kbit: ZeRO-3 keeps every parameter in bfloat16, and norms would be cast to another"
            f" dtype. {way_out}"
        ],
    ]


@pytest.mark.parametrize("version", [1, 2])
def test_a_model_loaded_for_fsdp_is_sharded_and_trains_as_the_whole_one(
    outcomes: dict[str, list[Any]], version: int
) -> None:
    for answer in outcomes[f"fsdp {version}"]:
        assert answer["dtypes"] == ["torch.bfloat16"]
        assert answer["same"] == []
        assert answer["held"] == answer["whole"] / 2
        mine, whole = answer["losses"]
        assert mine == whole
        assert mine[1] < mine[0]
