"""What docs/parity.md says that llmload does where the systems do something else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from recipes import ROOT
from transformers import AutoTokenizer

import llmload
from llmload.testing import edit_config, tiny_checkpoint, trainable

PAGE = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")


def written(part: str) -> dict[str, Any]:
    """Return the one fragment of a spec on the page that holds a text."""
    (found,) = {code for code in re.findall(r"`(\w+: [^`]+)`", PAGE) if part in code}
    keys: dict[str, Any] = yaml.safe_load(found)
    return keys


def test_deepspeed_chats_lora_trains_all_but_the_adapted_weights(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    plain = llmload.load({"model": str(folder)}).model
    adapted = ("_proj.weight",)
    wanted = {n for n, _ in plain.named_parameters() if not n.endswith(adapted)}
    spec = written("input_layernorm")
    model = llmload.load({"model": str(folder), **spec}).model
    found = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        for name in trainable(model)
        if "lora_" not in name
    }
    assert found == wanted
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    ranks = {rank for layer in layers for rank in layer.r.values()}
    assert {layer.scaling["default"] for layer in layers} == {1 / rank for rank in ranks}
    del spec["lora"]["modules_to_save"]
    alone = llmload.load({"model": str(folder), **spec}).model
    assert all("lora_" in name for name in trainable(alone))


@pytest.mark.parametrize("has_pad", [False, True])
def test_a_pad_token_is_added_only_where_there_is_none(has_pad: bool, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama", pad=has_pad)
    before = AutoTokenizer.from_pretrained(folder)
    spec = {"model": str(folder), "embeddings": {}, **written("[PAD]")}
    tokenizer = llmload.load(spec).tokenizer
    assert tokenizer.pad_token == (before.pad_token if has_pad else "[PAD]")
    assert tokenizer.pad_token_id == (before.pad_token_id if has_pad else len(before))


def test_an_eos_token_that_old_coati_misspelt_has_no_row_and_can_be_put_right(
    tmp_path: Path,
) -> None:
    plain = AutoTokenizer.from_pretrained(tiny_checkpoint(tmp_path, "llama"))
    folder = tiny_checkpoint(tmp_path, "llama", vocab_size=len(plain))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<\\s>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(llmload.PlanError, match=r"51 rows: the eos token '<.*s>' has id 51"):
        llmload.load({"model": str(folder)})
    keys = written("eos_token: </s>")
    keys["tokenizer"]["add_special_tokens"]["eos_token"] = plain.eos_token
    again = llmload.load({"model": str(folder), **keys})
    assert again.tokenizer.eos_token_id == again.model.config.eos_token_id == plain.eos_token_id


def test_a_bias_of_zeros_is_trained_with_coatis_layers_alone_and_factors_are_float32_unless_asked(
    tmp_path: Path,
) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    lora: dict[str, Any] = {"target_modules": ["q_proj"], "bias": "all"}
    spec = {"model": str(folder), "dtype": "bfloat16"}
    for dtype, keys in ((torch.float32, {}), (torch.bfloat16, {"adapter_dtype": "base"})):
        for coati in ({}, {"coati": {}}):
            model = llmload.load(spec | coati | {"lora": lora | keys}).model
            biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
            assert len(biases) == (2 if coati else 0)  # one per layer
            assert all(p.requires_grad and not p.any() for p in biases)
            assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {dtype}


def test_a_model_without_norms_or_gates_leaves_the_cast_nothing(tmp_path: Path) -> None:
    spec = {"model": str(tiny_checkpoint(tmp_path, "gpt2")), "dtype": "bfloat16"}
    with pytest.raises(llmload.PlanError, match=r"has 'norm\|gate' in its name\. Remove the rule"):
        llmload.load(spec | {"cast": {"modules": {"norm|gate": "float32"}}})
    llmload.load(spec)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_use_cache_is_the_configs_but_for_checkpointing(
    use_cache: bool, checkpointed: bool, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    edit_config(folder, use_cache=use_cache)
    spec: dict[str, Any] = {"model": str(folder)}
    if checkpointed:
        spec["gradient_checkpointing"] = {"use_reentrant": False}
    found = llmload.load(spec).model.config.use_cache
    assert found is (use_cache and not checkpointed)
