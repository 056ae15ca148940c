"""examples/trl_sft.yaml, trl_dpo.yaml and their legacy kin prepare QLoRA as two generations of TRL.

Written down here from trl f2cd57710 (after 1.9) and from 0.24.0, whose SFTTrainer does as
0.12's; the DPOTrainer does to 0.28.0. That TRL itself trains such a model as its own is in
test_kbit_trl.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from quantised import plain
from recipes import recipe, stored
from stacks import needs_bitsandbytes
from torch import nn
from transformers import AutoTokenizer

import llmload
from llmload.testing import losses, parameters, same, tiny_checkpoint, trainable

MODEL = "meta-llama/Llama-3.1-8B"
INSTRUCT = "meta-llama/Llama-3.1-8B-Instruct"
LORA: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}

pytestmark = [needs_bitsandbytes, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160}
    return tiny_checkpoint(
        tmp_path_factory.mktemp("trl") / "model",
        request.param,
        **(size if request.param == "llama" else {"n_embd": 64}),
    )


def quantised(folder: Path) -> Any:
    return plain(folder, {"quant_type": "nf4", "double_quant": False})


def as_trl_does(folder: Path) -> Any:
    """SFT since 0.26, DPO since 0.29: nothing is upcast, what is trained becomes bfloat16."""
    model = peft.get_peft_model(quantised(folder), peft.LoraConfig(**LORA))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def as_legacy_trl_does(folder: Path) -> Any:
    """SFT to 0.24, DPO to 0.28: norms in float32, embeddings and head in bfloat16."""
    base = peft.prepare_model_for_kbit_training(
        quantised(folder), gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    model = peft.get_peft_model(base, peft.LoraConfig(**LORA))
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) or "norm" in name:
            module.to(torch.float32)
        elif any(part in name for part in ("lm_head", "embed_tokens", "wte", "wpe")):
            module.to(torch.bfloat16)
    return model


PROFILES = pytest.mark.parametrize(
    ("name", "restated"),
    [("trl_sft", as_trl_does), ("trl_sft_legacy", as_legacy_trl_does)],
    ids=["current", "legacy"],
)


@PROFILES
def test_the_model_is_trls_bit_by_bit(folder: Path, name: str, restated: Any) -> None:
    torch.manual_seed(42)
    ours = llmload.load(recipe(name, {MODEL: folder})).model
    torch.manual_seed(42)
    theirs = restated(folder)
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert list(mine) == list(other)
    for key, parameter in mine.items():
        assert same(parameter, other[key]), key
        assert parameter.requires_grad == other[key].requires_grad, key
    states = {n: m.weight.quant_state for n, m in theirs.named_modules() if _is_4bit(m)}
    assert states
    for key, state in states.items():
        mine_state = ours.get_submodule(key).weight.quant_state
        assert same(mine_state.absmax, state.absmax), key
        assert (mine_state.quant_type, mine_state.nested) == ("nf4", False)
        assert ours.get_submodule(key).compute_dtype == torch.bfloat16
    # The Trainer's bf16=True.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert losses(ours, 2) == losses(theirs, 2)


def test_the_sft_trainer_of_0_25_is_written_as_the_page_says(folder: Path) -> None:
    theirs = quantised(folder)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(False)
        if parameter.dtype == torch.bfloat16 and "norm" in name.lower():
            parameter.data = parameter.data.float()
    lora = {key: value for key, value in LORA.items() if key != "task_type"}
    torch.manual_seed(42)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**LORA))
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):  # then peft_module_casting_to_bf16
            module.to(torch.float32)
    kbit = {"quant_type": "nf4", "cast": {"norms": "float32"}}
    torch.manual_seed(42)
    spec = {"model": str(folder), "dtype": "bfloat16", "kbit": kbit, "lora": lora}
    mine, other = (dict(m.named_parameters()) for m in (llmload.load(spec).model, theirs))
    assert list(mine) == list(other)
    for key, parameter in mine.items():
        assert same(parameter, other[key]), key


def _is_4bit(module: nn.Module) -> bool:
    return isinstance(module, Linear4bit) and isinstance(module.weight, Params4bit)


def test_the_profiles_differ_in_what_is_float32(folder: Path) -> None:
    found = {}
    for name in ("trl_sft", "trl_sft_legacy"):
        model = llmload.load(recipe(name, {MODEL: folder})).model
        wide = {n for n, p in parameters(model).items() if p.dtype == torch.float32}
        adapter = {n for n in wide if "lora_" in n}
        assert (adapter == trainable(model)) == (name == "trl_sft_legacy")
        found[name] = wide - adapter
    assert found["trl_sft"] == set()
    quantised = ("_proj.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight")
    narrow = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "wpe.weight")
    assert found["trl_sft_legacy"] == {
        name for name in stored(folder) if not name.endswith((*quantised, *narrow))
    }


# --- DPO ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "restated"),
    [("trl_dpo", as_trl_does), ("trl_dpo_legacy", as_legacy_trl_does)],
    ids=["current", "legacy"],
)
def test_policy_and_reference_are_those_of_dpo(folder: Path, name: str, restated: Any) -> None:
    """Every dropout module is off, the adapter's too; the reference is the base model."""
    torch.manual_seed(42)
    group = llmload.load_group(recipe(name, {INSTRUCT: folder}))
    torch.manual_seed(42)
    theirs = restated(folder)
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    policy, reference = group["policy"].model, group["reference"].model
    mine, other = dict(policy.named_parameters()), dict(theirs.named_parameters())
    assert list(mine) == list(other)
    for key, parameter in mine.items():
        assert same(parameter, other[key]), key
        assert parameter.requires_grad == other[key].requires_grad, key
    rates = [m.p for m in policy.modules() if isinstance(m, nn.Dropout)]
    assert set(rates) <= {0.0}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert losses(policy, 2) == losses(theirs, 2)
    # What it computes is in test_groups.py; bitsandbytes' kernel for eval on the CPU packs anew.
    assert (reference.model, reference.adapter) == (policy, None)
    assert list(reference.parameters()) == []


@pytest.mark.parametrize("pad", [False, True])
def test_a_missing_pad_token_becomes_eos_and_one_that_is_there_stays(
    tmp_path: Path, pad: bool
) -> None:
    folder = tiny_checkpoint(tmp_path / "llama", pad=pad)
    theirs = AutoTokenizer.from_pretrained(folder)
    if theirs.pad_token is None:
        theirs.pad_token = theirs.eos_token
    result = llmload.load(recipe("trl_sft", {MODEL: folder}))
    assert result.tokenizer.pad_token_id == theirs.pad_token_id == (3 if pad else 2)
    # TRL writes the id to both configs, too.
    assert result.model.config.pad_token_id == theirs.pad_token_id
    assert result.model.generation_config.pad_token_id == theirs.pad_token_id
