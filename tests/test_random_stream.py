"""A class that draws while it is built draws as often as under ``from_pretrained``, then only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from sameness import from_pretrained
from stacks import needs_bitsandbytes
from transformers import AutoModelForCausalLM

import llmload

DRAWS = "diffllama"
SECTIONS = {
    "plain": {},
    "frozen": {"trainable": False},
    "gradient checkpointing": {"gradient_checkpointing": {}},
    "cast": {"cast": {"modules": {"lm_head": "float32"}}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("draws")
    architectures.build("causal_lm", DRAWS).to(torch.bfloat16).save_pretrained(made)
    return made


def after(call: Any) -> list[int]:
    """Return the state of the random stream after a call that began at one seed."""
    torch.manual_seed(5)
    call()
    return torch.get_rng_state().tolist()  # type: ignore[no-any-return]


def of_transformers(folder: Path) -> list[int]:
    expected = after(lambda: from_pretrained(AutoModelForCausalLM, folder))
    assert expected != after(lambda: None)  # else this type tells nothing
    return expected


@pytest.mark.parametrize("block", [(), ("streaming",)], ids=["streaming", "transformers"])
@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_the_stream_moves_as_under_from_pretrained(
    section: dict[str, Any], block: tuple[str, ...], folder: Path
) -> None:
    registry = llmload.create_registry(block=block, environ={})
    spec = {"model": str(folder), **section}
    assert after(lambda: llmload.load(spec, registry=registry)) == of_transformers(folder)


@needs_bitsandbytes
@pytest.mark.parametrize("section", [{"double_quant": True}, {"bits": 8}], ids=["4", "8"])
def test_it_does_when_weights_are_quantised(section: dict[str, Any], folder: Path) -> None:
    spec = {"model": str(folder), "kbit": section}
    assert after(lambda: llmload.load(spec)) == of_transformers(folder)


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_a_plan_leaves_the_stream_where_it_is(section: dict[str, Any], folder: Path) -> None:
    spec = {"model": str(folder), **section}
    assert after(lambda: llmload.plan(spec)) == after(lambda: None)
