"""Sizes of the mesh against the ranks there are, and what is refused before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llmload
from llmload import RequestError
from llmload.testing import tiny_checkpoint
from llmload_fsdp.section import ParallelSection
from llmload_fsdp.sizes import Sizes, resolve


def sizes(ranks: int | None, **section: Any) -> Sizes | None:
    return resolve(ParallelSection(**section), ranks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama")


def test_one_copy_of_the_model_takes_all_ranks_that_the_other_sizes_leave() -> None:
    assert sizes(4) == Sizes(4, 1, 1, 1)
    assert sizes(4, dp_replicate_size=2) == Sizes(2, 2, 1, 1)
    assert sizes(8, tp_size=2, dp_replicate_size=2) == Sizes(2, 2, 2, 1)
    assert sizes(None) is None
    assert sizes(None, fsdp_size=4) == Sizes(4, 1, 1, 1)


def test_a_plan_for_tensor_parallel_without_a_size_takes_the_ranks_as_transformers_does() -> None:
    assert sizes(4, tp_plan="auto") == Sizes(1, 1, 4, 1)
    assert sizes(4, tp_plan="auto", fsdp_size=2) == Sizes(2, 1, 2, 1)


def test_sizes_that_are_not_the_ranks_are_refused_by_name() -> None:
    with pytest.raises(RequestError) as caught:
        sizes(2, fsdp_size=4)
    assert str(caught.value) == (
        "parallel.fsdp_size: fsdp_size 4 x dp_replicate_size 1 needs exactly 4 ranks, and the"
        " launcher has started 2. Start 4 ranks, or leave `fsdp_size` out, which takes all there"
        " are."
    )
    with pytest.raises(RequestError) as caught:
        sizes(4, dp_replicate_size=3)
    assert "dp_replicate_size 3 needs a multiple of 3 ranks" in str(caught.value)


def test_what_transformers_refuses_is_refused_in_its_words(folder: Path) -> None:
    section = ParallelSection(fsdp_size=2, tp_size=2, ep_size=3)
    found = resolve(section, 4)
    assert found is not None
    with pytest.raises(RequestError) as caught:
        found.config(section)
    assert str(caught.value) == (
        "parallel: transformers refuses these sizes: `ep_size` must be a multiple of `tp_size`."
        " Change the sizes that it names."
    )


def test_a_plan_names_modules_that_are_there(folder: Path) -> None:
    spec = {"model": str(folder), "parallel": {"fsdp_plan": {"model.blocks.*": "free_full_weight"}}}
    (problem,) = llmload.plan(spec).errors
    assert str(problem) == (
        "parallel.fsdp_plan: transformers refuses the plan: `fsdp_plan` keys ['model.blocks.*']"
        " match nothing in LlamaForCausalLM. Name modules as `named_modules()` does, with `*` for"
        " numbers."
    )


def test_the_plan_tells_what_each_rank_reads_and_keeps_for_some_numbers_of_ranks(
    folder: Path,
) -> None:
    plan = llmload.plan({"model": str(folder), "parallel": {}})
    said = [str(step) for step in plan.steps]
    total = plan.checkpoint_bytes
    assert any(f"each of 2 ranks reads at most {total // 2:,} of {total:,}" in s for s in said)
    assert any("6 units, 2 of them blocks" in s for s in said)


def test_mixed_precision_that_would_ruin_codes_of_four_bits_is_refused(folder: Path) -> None:
    parallel = {"fsdp_mixed_precision": True}
    spec = {"model": str(folder), "dtype": "float32", "kbit": {"bits": 4}, "parallel": parallel}
    assert str(llmload.plan(spec).errors[0]) == (
        "parallel.fsdp_mixed_precision: it casts every parameter to bfloat16 when it is used, codes"
        " of 4 bits that are stored as float32 too, which ruins them. Set `dtype: bfloat16`, or"
        " remove `fsdp_mixed_precision`: quantised layers compute in `kbit.compute_dtype` as it is."
    )
    stored = {"bits": 4, "quant_storage": "float32"}
    spec |= {"dtype": "bfloat16", "kbit": stored}
    assert "kbit.quant_storage: FSDP2's mixed precision casts" in str(llmload.plan(spec).errors[0])


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_offloading_where_there_is_no_accelerator_is_refused(folder: Path) -> None:
    (problem,) = llmload.plan({"model": str(folder), "parallel": {"fsdp_cpu_offload": True}}).errors
    assert str(problem) == (
        "parallel.fsdp_cpu_offload: there is no accelerator, so that everything is in host memory"
        " as it is. Remove it."
    )


def test_eight_bits_are_refused_as_they_cannot_be_split(folder: Path) -> None:
    plan = llmload.plan({"model": str(folder), "kbit": {"bits": 8}, "parallel": {}})
    assert str(plan.errors[0]).startswith(
        "kbit.bits: `parallel` cannot split 8-bit weights: bitsandbytes keeps the whole codes in"
        " the layer"
    )


@pytest.mark.parametrize("other", [{"device_map": "auto"}, {"zero3": {}}])
def test_two_that_place_the_same_weights_are_refused(folder: Path, other: dict[str, Any]) -> None:
    with pytest.raises(llmload.RequestError) as caught:
        llmload.plan({"model": str(folder), "parallel": {}, **other}).raise_for_errors()
    assert "parallel" in str(caught.value)
    assert "cannot be combined" in str(caught.value)


def test_norms_may_be_cast_where_accelerate_has_announced_fsdp(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another FSDP wants one dtype for all that a block has; here what is cast has its own unit."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    kbit = {"bits": 4, "prepare": "legacy"}
    spec = {"model": str(folder), "dtype": "bfloat16", "kbit": kbit}
    assert llmload.plan(spec | {"parallel": {}}).errors == []
    (problem,) = llmload.plan(spec).errors
    assert "FSDP shards parameters of one floating-point dtype" in str(problem)
