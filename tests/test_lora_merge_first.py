"""Saved adapters that are merged into the base before another one is made, resumed or merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import load, refusal, same_state, save
from safetensors.torch import load_file, save_file
from stacks import needs_bitsandbytes
from transformers import AutoModelForCausalLM

import llmload
from llmload.errors import AuditError
from llmload.testing import IDS, tiny_llama

QV: dict[str, Any] = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("first"))


def trained(model: Any, seed: int, folder: Path) -> Path:
    """Give what is trainable other values, and save it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return save(model, folder)


@pytest.fixture(scope="module")
def sft(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(load(llama, QV).model, 1, tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def other(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    section = {"r": 3, "target_modules": ["k_proj", "q_proj", "down_proj"]}
    return trained(load(llama, section).model, 2, tmp_path_factory.mktemp("other"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits  # type: ignore[no-any-return]


def test_a_new_adapter_starts_from_the_merged_base_as_in_plain_peft(
    llama: Path, sft: Path, other: Path
) -> None:
    torch.manual_seed(5)
    result = load(llama, {"merge_first": [str(sft), str(other)], **QV})
    base = AutoModelForCausalLM.from_pretrained(llama)
    torch.manual_seed(5)
    for folder in (sft, other):
        base = peft.PeftModel.from_pretrained(base, folder).merge_and_unload()
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **QV))
    assert same_state(result.model, theirs)
    assert result.plan.trainable_parameters == [
        name for name, parameter in theirs.named_parameters() if parameter.requires_grad
    ]
    assert result.plan.steps[-1].notes[:2] == [
        f"merge the adapter in '{folder}' into the base first" for folder in (sft, other)
    ]
    assert set(result.report.newly_initialised.values()) == {"made by PEFT"}
    assert result.report.audit[-1] == (
        "13 of the checkpoint's 21 tensors are in the model as they are stored, by their first and"
        " last values; 8 more were, and plugins have changed them since"
    )


def test_the_adapter_remembers_what_was_merged_and_is_resumed_and_merged_on_top_of_it(
    llama: Path, sft: Path, tmp_path: Path
) -> None:
    model = load(llama, {"merge_first": [str(sft)], **QV}).model
    dpo = trained(model, 3, tmp_path / "dpo")
    assert json.loads((dpo / "adapter_config.json").read_text())["llmload_merged_first"] == [
        str(sft)
    ]
    again = load(llama, {"merge_first": [str(sft)], "adapter": str(dpo)})
    assert same_state(again.model, model)
    assert again.plan.warnings == []
    merged = load(llama, {"merge_first": [str(sft)], "adapter": str(dpo), "merge": True})
    assert type(merged.model).__name__ == "LlamaForCausalLM"
    assert merged.report.newly_initialised == {}
    torch.testing.assert_close(logits(merged.model), logits(model))
    forgotten = llmload.plan({"model": str(llama), "lora": {"adapter": str(dpo)}})
    assert [str(warning) for warning in forgotten.warnings] == [
        f"lora.merge_first: the adapter in '{dpo}' was trained on its base with '{sft}' merged into"
        f" it, and here nothing is. Write `merge_first: [{sft}]`, unless the model has it in its"
        " weights already."
    ]


def test_the_policy_with_its_adapter_off_is_the_merged_reference(llama: Path, sft: Path) -> None:
    policy = {"model": str(llama), "lora": {"merge_first": [str(sft)], **QV}}
    group = llmload.load_group({"models": {"policy": policy, "ref": {"adapter_of": "policy"}}})
    merged = load(llama, {"adapter": str(sft), "merge": True}).model
    assert torch.equal(logits(group["ref"].model), logits(merged))


def damaged(adapter: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return str(folder)


def test_what_cannot_be_merged_first_is_refused_by_that_key(
    llama: Path, other: Path, tmp_path: Path
) -> None:
    first = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    lacking = damaged(other, tmp_path / "lacking", lambda tensors: tensors.pop(first))
    assert refusal(llama, {"merge_first": [lacking], **QV}) == (
        f"lora.merge_first: the adapter in '{lacking}' lacks '{first}'. Save it again, complete; or"
        " check that model and adapter belong together."
    )
    nowhere = str(tmp_path / "nowhere")
    assert refusal(llama, {"merge_first": [nowhere], **QV}) == (
        f"lora.merge_first: the adapter folder '{nowhere}' does not exist. Give a folder written by"
        " save_pretrained of a PeftModel."
    )
    (config := tmp_path / "lacking" / "adapter_config.json").write_text(
        json.dumps(json.loads(config.read_text()) | {"llmload_merged_first": "sft"})
    )
    assert refusal(llama, {"adapter": lacking}) == (
        f"{config}: lora.adapter: 'llmload_merged_first' is not a list of folders. Save the adapter"
        " again."
    )


@pytest.mark.refused_late  # only the weights tell
def test_what_is_merged_first_must_be_finite(llama: Path, other: Path, tmp_path: Path) -> None:
    second = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
    spoilt = damaged(
        other, tmp_path / "spoilt", lambda tensors: tensors[second][0].fill_(torch.inf)
    )
    with pytest.raises(AuditError) as caught:
        load(llama, {"merge_first": [spoilt], **QV})
    assert str(caught.value) == (
        "lora.merge_first: merged weights of 'model.layers.0.mlp.down_proj' are not finite. Load in"
        " a wider `dtype`, or check the adapter."
    )


@needs_bitsandbytes
def test_nothing_is_merged_first_into_few_bits(llama: Path, sft: Path) -> None:
    pytest.importorskip("bitsandbytes")
    assert refusal(llama, {"merge_first": [str(sft)], **QV}, kbit={}) == (
        "lora.merge_first: the base is quantised, and an adapter merged into so few bits is mostly"
        " lost. Remove `kbit`: the base is then read in full precision, and merged there."
    )


def test_the_lock_covers_what_is_merged_first(llama: Path, sft: Path, other: Path) -> None:
    from llmload.host.registry import create_registry
    from llmload.loading import lock
    from llmload.loading.planning import prepare_to_load

    registry = create_registry()
    section = {"merge_first": [str(sft), str(other)], **QV}
    spec = registry.validate({"model": str(llama), "lora": section})
    found = lock.make(prepare_to_load(spec, registry)).files
    assert {f"merged{number}/{WEIGHTS}" for number in (1, 2)} < found.keys()
