"""Policies that old coati saved with LoRA factors beside the weights are what they computed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from making import IDS, MASK, OPENS_PICKLES, read, write
from ranks import load_policy
from safetensors.torch import save_file
from test_factors import RANK, LoraLinear, converted

import llmload
from llmload.testing import assert_plugin, run_on_ranks, same, tiny_checkpoint, tiny_model
from llmload_rlhf.policies import CoatiPolicyPlugin

CASES = [("llama", 15), ("gpt2", 1), ("opt", 13)]
"""Model type -> its linear layers, the head among them, which two of the three tie."""


def adapted(folder: Path, model_type: str, *, wrapped: bool) -> tuple[Path, Any]:
    """Save a policy with factors in every linear layer: under the wrapper's names, or without."""
    tiny_checkpoint(folder, model_type)
    model = tiny_model(model_type, seed=9)
    torch.manual_seed(4)
    converted(model)
    state = model.state_dict()
    if wrapped:
        state = {f"model.{key}": value for key, value in state.items()}
    return write(folder, state), model.eval()


def spec(folder: Path, **keys: Any) -> dict[str, Any]:
    found = {"model": str(folder), "allow_pickle": OPENS_PICKLES, "dtype": "float32"}
    return found | {"coati_policy": {"version": "0.2.8"}} | keys


@pytest.mark.parametrize("block", [(), ("streaming",)], ids=["streaming", "transformers"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["0.2.8", "0.3.4"])
@pytest.mark.parametrize(("model_type", "count"), CASES)
def test_a_policy_computes_what_it_did_when_it_was_saved(
    model_type: str, count: int, wrapped: bool, block: tuple[str, ...], tmp_path: Path
) -> None:
    folder, theirs = adapted(tmp_path, model_type, wrapped=wrapped)
    result = llmload.load(spec(folder), registry=llmload.create_registry(block=set(block)))
    layers = {n: m for n, m in theirs.named_modules() if isinstance(m, LoraLinear)}
    assert len(layers) == count
    weights = dict(theirs.named_parameters(remove_duplicate=False))
    for name, parameter in result.model.named_parameters(remove_duplicate=False):
        layer = layers.get(name.removesuffix(".weight"))
        wanted = weights[name]
        if layer is not None and name.endswith(".weight"):
            wanted = wanted + (layer.lora_B @ layer.lora_A) * (1 / RANK)
        assert same(parameter, wanted), name
        assert parameter.requires_grad
    ours = result.model(IDS, attention_mask=MASK).logits
    wanted = theirs(IDS, attention_mask=MASK).logits
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)
    assert result.report.newly_initialised == {}
    assert result.report.left_out == {}
    result.model.save_pretrained(tmp_path / "merged")
    again = llmload.load({"model": str(tmp_path / "merged"), "dtype": "float32"}).model
    assert torch.equal(again(IDS, attention_mask=MASK).logits, ours)


def test_the_plan_says_what_is_merged_and_untied(tmp_path: Path) -> None:
    folder, _ = adapted(tmp_path, "gpt2", wrapped=True)
    plan = llmload.plan(spec(folder))
    (step,) = [step for step in plan.steps if step.plugin == "coati_policy"]
    assert step.notes == [
        "LoRA factors of 1 layer are merged, scaled by 1 / r (r: 2)",
        "'lm_head.weight' has factors that 'transformer.wte.weight' lacks: they are untied",
    ]


def test_new_tokens_and_a_new_adapter_come_after_the_merge(tmp_path: Path) -> None:
    folder, theirs = adapted(tmp_path, "gpt2", wrapped=True)
    keys = {"embeddings": {"pad_to_multiple_of": 64}, "lora": {"r": 2, "target_modules": ["c_fc"]}}
    model = llmload.load(spec(folder, **keys)).model.get_base_model()
    head = theirs.lm_head
    rows = head.weight + head.lora_B @ head.lora_A / RANK
    assert same(model.lm_head.weight[: len(rows)], rows)
    assert same(model.transformer.wte.weight[: len(rows)], theirs.transformer.wte.weight)


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    folder, _ = adapted(tmp_path, "llama", wrapped=False)
    state = read(folder)
    del state["lm_head.lora_B"]
    write(folder, copy.copy(state))
    (text,) = map(str, llmload.plan(spec(folder)).errors)
    assert text.endswith(
        "lm_head.lora_A: the checkpoint has no 'lm_head.lora_B' beside it. Check that the file is"
        " whole, and that config.json and weights belong together."
    )
    write(folder, {key: value for key, value in state.items() if "lora_" not in key})
    with pytest.raises(llmload.RequestError) as caught:
        llmload.load(spec(folder))
    assert str(caught.value) == (
        "coati_policy: the checkpoint keeps no LoRA factors beside its weights. Remove"
        " `coati_policy`."
    )


def test_every_rank_merges_its_part(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    folder, theirs = adapted(tmp_path / "model", "gpt2", wrapped=True)
    found = run_on_ranks(load_policy, spec(folder), process_group=False)
    head = theirs.lm_head
    wanted = head.weight + head.lora_B @ head.lora_A / RANK
    for outcome in found:
        assert outcome["partitioned"]
        assert same(torch.tensor(outcome["head"]), wanted)


def test_it_keeps_the_contract(tmp_path: Path) -> None:
    folder, _ = adapted(tmp_path, "llama", wrapped=True)
    values = {name: value.clone() for name, value in read(folder).items()}
    (folder / "pytorch_model.bin").unlink(missing_ok=True)  # which a plan has to open
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    assert_plugin(CoatiPolicyPlugin, spec=spec(folder), bad=[{}, {"version": "colossalchat"}])
