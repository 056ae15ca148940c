"""No two parameters lie over the same memory, whatever a file of torch.save shares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import llmload
from llmload.model import overlaps
from llmload.testing import edit_config, same, tiny_checkpoint

SHARED: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "all of it": lambda state: state.update(
        {"lm_head.weight": state["transformer.wte.weight"]},
    ),
    "a part of it": lambda state: state.update(
        {"transformer.ln_f.weight": state["transformer.wte.weight"].view(-1)[5:21]},
    ),
}
"""What two names of a file share."""


@pytest.mark.skipif(not hasattr(torch, "accelerator"), reason="torch 2.5 opens no pickle safely")
@pytest.mark.parametrize("block", [(), ("streaming",)], ids=["streaming", "transformers"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", SHARED)
def test_an_update_of_one_parameter_changes_no_other(
    what: str, dtype: str, block: tuple[str, ...], tmp_path: Path
) -> None:
    folder = edit_config(tiny_checkpoint(tmp_path / "gpt2", "gpt2"), tie_word_embeddings=False)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    SHARED[what](state)
    torch.save(state, folder / "pytorch_model.bin")
    model = llmload.load(
        {"model": str(folder), "dtype": dtype, "allow_pickle": True},
        registry=llmload.create_registry(block=set(block)),
    ).model
    right = {name: value.to(getattr(torch, dtype)) for name, value in state.items()}
    parameters = dict(model.named_parameters())
    assert parameters.keys() == right.keys()
    for name, parameter in parameters.items():
        assert same(parameter, right[name]), name
        with torch.no_grad():
            parameter.fill_(torch.nan)
        del right[name]
        assert all(same(parameters[other], right[other]) for other in right), name
        right = {name: torch.full_like(parameter, torch.nan), **right}


def test_one_parameter_under_two_names_stays_one() -> None:
    model = nn.Module()
    model.first = nn.Linear(2, 2)
    model.second = model.first
    model.third = nn.Linear(2, 2)
    model.third.weight = nn.Parameter(model.first.weight.data)
    assert overlaps.part(model) == ["third.weight"]
    assert model.second.weight is model.first.weight
    assert torch.equal(model.third.weight, model.first.weight)
    assert overlaps.part(model) == []
