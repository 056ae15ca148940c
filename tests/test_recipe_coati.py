"""examples/coati_sft.yaml loads the actor that stage 1 of old Coati trains.

What its scripts do is written down here from ColossalAI v0.3.4, applications/Chat. Stages 2 and 3
need the distribution llmload-rlhf and are tested there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from recipes import ROOT, recipe, stored
from sameness import differences
from stacks import needs_safe_pickles
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

import llmload
from llmload.hf import installed_transformers
from llmload.testing import IDS, SENTENCES, parameters, same, tiny_checkpoint, trainable

MODEL = "openai-community/gpt2"


class Actor(nn.Module):
    """Coati's wrapper of a causal model: from the folder, then cast as a whole."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        options = installed_transformers().dtype_option(torch.float32)
        self.model = GPT2LMHeadModel.from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("coati") / "gpt2", "gpt2")


@pytest.fixture(scope="module")
def result(folder: Path) -> llmload.LoadResult:
    return llmload.load(recipe("coati_sft", {MODEL: folder}))


def test_the_model_is_the_one_inside_coatis_actor(result: llmload.LoadResult, folder: Path) -> None:
    theirs: Any = Actor(folder).to(torch.bfloat16).model
    # A cast of modules is no matter for the config, nor does Coati say there what pads.
    (dtype,) = installed_transformers().dtype_option(torch.bfloat16)
    setattr(theirs.config, dtype, torch.bfloat16)
    for config in (theirs.config, theirs.generation_config):
        config.pad_token_id = 2
    assert differences(result.model, theirs) == []
    held = parameters(result.model)
    for name, tensor in stored(folder).items():
        assert same(held[name], tensor.to(torch.bfloat16)), name
    assert trainable(result.model) == set(held)


@needs_safe_pickles
def test_what_coati_saves_of_a_trained_actor_is_loaded_again(
    result: llmload.LoadResult, folder: Path, tmp_path: Path
) -> None:
    """Its save_pretrained leaves a pickle whose keys have lost their first ``model.``."""
    actor = Actor(folder).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(1)
    actor.model.config.save_pretrained(tmp_path)
    state = {key.replace("model.", "", 1): value for key, value in actor.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)

    again = llmload.load(recipe("coati_sft", {MODEL: tmp_path}) | {"allow_pickle": True}).model
    for name, parameter in parameters(again).items():
        assert same(parameter, parameters(actor.model)[name]), name


class LoraLinear(nn.Module):
    """Coati's adapted layer: factors in the weight's dtype, scaled by 1 / r."""

    def __init__(self, linear: nn.Linear, r: int) -> None:
        super().__init__()
        self.weight, self.bias, self.r = linear.weight, linear.bias, r
        self.lora_A = nn.Parameter(self.weight.new_zeros((r, linear.in_features)))
        self.lora_B = nn.Parameter(self.weight.new_zeros((linear.out_features, r)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added = (x @ self.lora_A.t() @ self.lora_B.t()) * (1 / self.r)
        return functional.linear(x, self.weight, self.bias) + added


def converted(module: nn.Module, r: int) -> None:
    """Adapt every nn.Linear, as Coati's LoRAModule does; GPT-2's Conv1D is none."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, LoraLinear(child, r))
        else:
            converted(child, r)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_page_says_how_to_have_coatis_adapter(
    model_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    name = {"gpt2": "[lm_head]", "llama": "down_proj, lm_head]"}[model_type]
    page = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    (written,) = (code for code in re.findall(r"`(lora: [^`]+)`", page) if name in code)
    folder = tiny_checkpoint(tmp_path, model_type)
    spec = {"model": str(folder), "dtype": str(dtype).removeprefix("torch.")}
    ours = llmload.load(spec | yaml.safe_load(written)).model
    options = installed_transformers().dtype_option(dtype)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    r = ours.peft_config["default"].r
    converted(theirs, r)

    state = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
        for name, parameter in ours.named_parameters()
        if parameter.requires_grad
    }
    factors = {name: p for name, p in theirs.named_parameters() if "lora_" in name}
    assert state.keys() == factors.keys()  # Coati trains these, and no bias
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in factors.items():
            assert (state[name].shape, state[name].dtype) == (parameter.shape, parameter.dtype)
            assert state[name].any() == name.endswith("lora_A")
            state[name].normal_(std=0.1)
            parameter.copy_(state[name])
        assert same(ours(IDS).logits, theirs.eval()(IDS).logits)


def test_the_tokenizer_pads_with_eos_on_the_right(result: llmload.LoadResult, folder: Path) -> None:
    plain = AutoTokenizer.from_pretrained(folder)
    plain.pad_token = plain.eos_token
    texts = list(SENTENCES)
    assert result.tokenizer(texts, padding=True).data == plain(texts, padding=True).data
    assert result.tokenizer.pad_token_id == 2
