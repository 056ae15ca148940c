"""examples/colossalchat_sft.yaml loads what ColossalChat's train_sft.py trains.

What that does is written down here from ColossalAI 4f9953be3, applications/ColossalChat: its order
of steps, and its LoRA layers in plain torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import EXAMPLES, ROOT, recipe, stored
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmload
from llmload.hf import installed_transformers
from llmload.testing import IDS, SENTENCES, parameters, same, tiny_llama, trainable

FILE = json.loads((EXAMPLES / "lora_config.json").read_text())
MODEL = "meta-llama/Meta-Llama-3-8B"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("colossalchat"), shards=2)


@pytest.fixture(scope="module")
def result(folder: Path) -> llmload.LoadResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # where the example says that lora_config.json is
        return llmload.load(recipe("colossalchat_sft", {MODEL: folder}))


class CoatiLinear(nn.Module):
    """A linear layer and its low-rank factors, as coati/models/lora.py computes them."""

    def __init__(self, base: nn.Linear, factor_in: torch.Tensor, factor_out: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.factor_in, self.factor_out = nn.Parameter(factor_in), nn.Parameter(factor_out)
        # Whatever lora_config.json says: the file of the example says the same.
        self.scaling, self.dropout = 32 / len(factor_in), nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.dropout(x) @ self.factor_in.t() @ self.factor_out.t()
        return nn.functional.linear(x, self.weight, self.bias) + low * self.scaling


def as_colossalchat_does(
    folder: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> Any:
    """Load in bfloat16, convert every layer whose own name is in a target, cast norms and gates."""
    options = installed_transformers().dtype_option(torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, nn.Linear) and any(leaf in text for text in FILE["target_modules"]):
            setattr(model.get_submodule(parent), leaf, CoatiLinear(module, *factors.pop(name)))
    for name, module in model.named_modules():
        if "norm" in name or "gate" in name:
            module.to(torch.float32)
    return model  # checkpointing changes no result


def factors_of(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        name: (module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach())
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }


def test_every_weight_is_the_files_in_bfloat16_with_norms_and_gates_widened(
    result: llmload.LoadResult, folder: Path
) -> None:
    held = parameters(result.model)
    for name, tensor in stored(folder).items():
        expected = tensor.to(torch.bfloat16)
        if "norm" in name or "gate" in name:
            expected = expected.float()
        assert same(held[name], expected), name


def test_the_factors_are_all_that_is_trained(result: llmload.LoadResult, folder: Path) -> None:
    factors = factors_of(result.model)
    assert set(factors) == {
        name.removesuffix(".weight") for name in stored(folder) if "_proj" in name
    }
    assert trainable(result.model) == {
        f"{name}.{factor}.default.weight" for name in factors for factor in ("lora_A", "lora_B")
    }
    for factor_in, factor_out in factors.values():
        assert factor_in.dtype == factor_out.dtype == torch.float32
        assert len(factor_in) == FILE["r"]
        # Uniform within 1 / sqrt(inputs), as kaiming_uniform_ with a = sqrt(5) has it.
        assert 0 < factor_in.abs().max() <= factor_in.shape[1] ** -0.5
        assert not factor_out.any()


@pytest.mark.parametrize("trained", [False, True], ids=["as loaded", "factors trained"])
def test_forward_and_backward_are_colossalchats(folder: Path, trained: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        ours = llmload.load(recipe("colossalchat_sft", {MODEL: folder})).model
    factors = factors_of(ours)
    if trained:
        torch.manual_seed(0)
        for _, factor_out in factors.values():
            factor_out.normal_(std=0.02)
    theirs = as_colossalchat_does(
        folder, {n: (a.clone(), b.clone()) for n, (a, b) in factors.items()}
    )
    losses = []
    for model in (ours, theirs):
        model.train()
        # What a Booster with mixed precision does for a model of several dtypes.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
    assert same(*losses)
    for name, module in ours.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            other = theirs.get_submodule(name)
            assert same(module.lora_A["default"].weight.grad, other.factor_in.grad), name
            assert same(module.lora_B["default"].weight.grad, other.factor_out.grad), name


def test_the_tokenizer_pads_with_eos_on_the_right_and_adds_nothing(
    result: llmload.LoadResult, folder: Path
) -> None:
    plain = AutoTokenizer.from_pretrained(folder)
    plain.pad_token, plain.padding_side = plain.eos_token, "right"
    texts = list(SENTENCES)
    assert result.tokenizer(texts, padding=True).data == plain(texts, padding=True).data
    assert (result.tokenizer.pad_token_id, result.tokenizer.padding_side) == (2, "right")
    ids = result.tokenizer(SENTENCES[0]).input_ids
    assert not {result.tokenizer.bos_token_id, result.tokenizer.eos_token_id} & set(ids)
    # ColossalChat leaves the model's config without a pad id.
    assert result.model.config.pad_token_id == 2


def test_layers_are_checkpointed_without_reentrance(result: llmload.LoadResult) -> None:
    functions = [
        module._gradient_checkpointing_func
        for module in result.model.modules()
        if getattr(module, "gradient_checkpointing", False)
    ]
    assert functions
    assert {function.keywords["use_reentrant"] for function in functions} == {False}
