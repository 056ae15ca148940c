"""Merging a saved adapter: into the full-precision base, streamed again, and into nothing less."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import load, needs_peft, refusal, save, three_losses
from safetensors.torch import load_file, save_file
from stacks import needs_bitsandbytes
from transformers import AutoModelForCausalLM

import llmload
from llmload.errors import AuditError, SpecError
from llmload.testing import IDS, tiny_llama

pytest.importorskip("bitsandbytes")
pytestmark = needs_bitsandbytes

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(
        tmp_path_factory.mktemp("merge"),
        dtype=torch.bfloat16,
        hidden_size=64,
        intermediate_size=160,
    )


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on the base in 4 bits."""
    spec = {"model": str(llama), "dtype": "bfloat16", "kbit": {}, "lora": LORA}
    model = llmload.load(spec).model
    three_losses(model)
    return save(model, tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_adapter_is_merged_into_the_full_precision_base_as_peft_merges_it(
    dtype: str, llama: Path, adapter: Path
) -> None:
    result = load(llama, {"adapter": str(adapter), "merge": True}, dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=getattr(torch, dtype))
    theirs = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    assert type(result.model) is type(theirs)
    mine, other = result.model.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert not any(parameter.requires_grad for parameter in result.model.parameters())
    assert not result.model.training
    assert result.report.loader == "streaming"
    assert result.report.newly_initialised == {}
    assert result.report.facts["lora"]["merged"] is True


@pytest.mark.refused_late  # only the weights tell
def test_a_merge_that_is_not_finite_fails_the_audit(llama: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    spoilt = load_file(file)
    spoilt[next(name for name in spoilt if "layers.0.mlp.up_proj.lora_B" in name)][0] = torch.inf
    broken = adapter.parent / "spoilt"
    shutil.copytree(adapter, broken, dirs_exist_ok=True)
    save_file(spoilt, broken / file.name, {"format": "pt"})
    with pytest.raises(AuditError) as caught:
        load(llama, {"adapter": str(broken), "merge": True})
    assert str(caught.value) == (
        "lora.merge: merged weights of 'model.layers.0.mlp.up_proj' are not finite. Load in a wider"
        " `dtype`, or check the adapter."
    )


def test_the_folder_of_the_base_is_not_written_to(llama: Path, adapter: Path) -> None:
    before = {file.name: file.read_bytes() for file in llama.iterdir()}
    load(llama, {"adapter": str(adapter), "merge": True}, dtype="bfloat16")
    assert {file.name: file.read_bytes() for file in llama.iterdir()} == before


@pytest.mark.parametrize("section", [{}, {"bits": 8}])
def test_an_adapter_is_never_merged_into_few_bits(
    section: dict[str, Any], llama: Path, adapter: Path
) -> None:
    merge = {"adapter": str(adapter), "merge": True}
    assert refusal(llama, merge, kbit=section) == (
        "lora.merge: the base is quantised, and an adapter merged into so few bits is mostly lost."
        " Remove `kbit`: the base is then read in full precision, and merged there."
    )


def test_nor_into_a_checkpoint_that_is_quantised_already(
    llama: Path, adapter: Path, tmp_path: Path
) -> None:
    spec = {"model": str(llama), "dtype": "bfloat16", "kbit": {}}
    llmload.load(spec).model.save_pretrained(tmp_path)
    assert refusal(tmp_path, {"adapter": str(adapter), "merge": True}, kbit={}) == (
        "lora.merge: the base is quantised, and an adapter merged into so few bits is mostly lost."
        " Load the checkpoint from before it was quantised."
    )


@needs_peft("0.16.0")
@pytest.mark.parametrize("bits", [4, 8])
def test_orthogonal_factors_are_resumed_on_few_bits_and_not_made_there(
    bits: int, llama: Path, tmp_path: Path
) -> None:
    orthogonal = LORA | {"init_lora_weights": "orthogonal"}
    assert refusal(llama, orthogonal, kbit={"bits": bits}) == (
        "lora: 'lora' cannot be combined with 'kbit': PEFT gives the factors of `init_lora_weights:"
        " orthogonal` the dtype of the weights, which are codes there. Use `init_lora_weights:"
        " true`, gaussian or olora."
    )
    made = load(llama, orthogonal).model
    resumed = load(llama, {"adapter": str(save(made, tmp_path))}, kbit={"bits": bits}).model
    found = dict(resumed.named_parameters())
    factors = {name: value for name, value in made.named_parameters() if "lora_" in name}
    assert factors
    assert all(torch.equal(found[name], value) for name, value in factors.items())


def test_there_must_be_an_adapter_to_merge(llama: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load(llama, {"merge": True})
    assert str(caught.value) == (
        "lora: `merge` is for a saved adapter, and none is named. Set `adapter` to its folder."
    )


@needs_peft("0.21.0")
def test_what_waits_for_values_is_merged_too(llama: Path, tmp_path: Path) -> None:
    section = {"r": 2, "target_modules": ["q_proj"], "kasa_config": {}}
    made = load(llama, section, dtype="float32").model
    three_losses(made)
    save(made, tmp_path)
    merged = load(llama, {"adapter": str(tmp_path), "merge": True}, dtype="float32").model
    with torch.no_grad():
        expected = made.eval()(input_ids=IDS).logits
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected)


@needs_peft("0.18.0")
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"lora_bias": True},
            "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias",
        ),
        ({"alora_invocation_tokens": [3, 4]}, "aLoRA does not support merging"),
    ],
)
def test_what_peft_cannot_merge_is_refused_in_the_plan(
    llama: Path, tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    section = {"r": 2, "target_modules": ["q_proj"], **fields}
    save(load(llama, section).model, tmp_path)
    assert refusal(llama, {"adapter": str(tmp_path), "merge": True}) == (
        f"lora.merge: PEFT refuses this adapter: {reason}. Resume it as the section's `adapter`,"
        " without `merge`."
    )
