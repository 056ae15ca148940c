"""What other tools' keys are answered with: each advice is put into a spec, and loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from stacks import IS_MODERN, NO_BITSANDBYTES

import llmload
from llmload.spec.foreign_keys import of_sections
from llmload.spec.refusals import unknown_key
from llmload.testing import tiny_llama, tiny_model

SPELLINGS = of_sections(llmload.create_registry(environ={}).sections.values())
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
DEEPSPEED = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}
HERE = "{here}"
"""Stands in a value for the folder that the files of the tests are in."""

VALUES: dict[str, list[Any]] = {
    "model_name_or_path": [f"{HERE}/model"],
    "pretrained_model_name_or_path": [f"{HERE}/model"],
    "model_name": [f"{HERE}/model"],
    "base_model": [f"{HERE}/model"],
    "pretrain": [f"{HERE}/model"],
    "model_id_or_path": [f"{HERE}/model"],
    "model_type": ["AutoModelForCausalLM", "LlamaForCausalLM", "llama", "AutoModelForX"],
    "type_of_model": ["AutoModelForCausalLM", "LlamaForCausalLM"],
    "task_type": ["CAUSAL_LM", "causal_lm", "QUESTION_ANS"],
    "torch_dtype": ["auto", "bfloat16", "torch.float32", "bf16", "fp8"],
    "infer_dtype": ["auto", "float16"],
    "mixed_precision": ["bf16", "fp16", "no"],
    "policy_dtype": ["float32"],
    "reference_dtype": ["float16"],
    "bf16": [True, "auto"],
    "fp16": [True],
    "local_dirs": [["/scr", ".cache"]],
    "key_mapping": [{"^module\\.": ""}],
    "overrides_of_model_config": [{"attention_dropout": 0.1}],
    "archive": [f"{HERE}/policy.pt"],
    "flash_attn": ["auto", "disabled", "sdpa"],
    "attn_impl": ["eager", "sdpa"],
    "flash_attention": [False],
    "use_flash_attention_2": [False],
    "use_flash_attn": [False],
    "flex_attention": [False],
    "pad_token": ["</s>"],
    "eos_token": ["<|im_end|>", "</s>"],
    "padding_side": ["left"],
    "chat_template": ["chatml", "tokenizer_default", TEMPLATE],
    "chat_template_path": [f"{HERE}/chat.jinja"],
    "chat_template_jinja": [TEMPLATE, f"{HERE}/chat.jinja"],
    "tokens": [["<tool>"]],
    "add_tokens": ["<tool>, <think>"],
    "new_special_tokens": ["<tool>,<think>", ["<tool>"]],
    "add_special_tokens": ["<tool>,<think>"],
    "special_tokens": [
        {"pad_token": "<|end_of_text|>"},
        {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<unk>"},
        {"eos_token": "</s>", "unk_token": None},
    ],
    "use_fast_tokenizer": [True],
    "tokenizer_use_fast": [True],
    "tokenizer_name_or_path": [f"{HERE}/model"],
    "tokenizer_config": [f"{HERE}/model"],
    "shrink_embeddings": [True],
    "gradient_checkpointing_kwargs": [
        {"use_reentrant": False},
        {"use_reentrant": True, "preserve_rng_state": True},
    ],
    "use_reentrant_gc": [True],
    "peft_config": [{"r": 4, "lora_alpha": 8}],
    "lora_config": [{"r": 4}],
    "adapter": ["lora", "qlora", "full", "ia3"],
    "finetuning_type": ["lora", "full", "freeze"],
    "tuner_type": ["lora", "full"],
    "train_type": ["lora", "full"],
    "adapter_name_or_path": [
        f"{HERE}/adapter",
        [f"{HERE}/adapter"],
        [f"{HERE}/adapter", f"{HERE}/adapter"],
        f"{HERE}/adapter,{HERE}/adapter",
        [],
    ],
    "lora_model_dir": [f"{HERE}/adapter"],
    "lora_alpha": [16, 16.0],
    "lora.alpha": [16],
    "lora_dropout": [0.05, 0],
    "lora.dropout": [0.05],
    "lora_target": ["all", "q_proj,v_proj", "q_proj"],
    "lora_target_modules": [
        ["q_proj", "v_proj"],
        "all",
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ],
    "lora_module_name": ["decoder.layers."],
    "target_modules": [["all"], "all-linear", ["q_proj"]],
    "lora_target_parameters": [["up_proj.weight"]],
    "additional_target": ["embed_tokens,lm_head"],
    "lora_modules_to_save": [["embed_tokens", "lm_head"]],
    "modules_to_save": [["lm_head"]],
    "lora_train_bias": ["none"],
    "lora_dtype": ["bfloat16", "fp32"],
    "init_lora_weights": ["gaussian", True],
    "init_weights": ["gaussian", "true"],
    "peft_init_lora_weights": ["pissa"],
    "pissa_iter": [4, -1],
    "peft": [{"loftq_config": {"loftq_bits": 4}}],
    "peft_autocast_adapter_dtype": [True],
    "lora_rank_pattern": [{"q_proj": 4}],
    "lora_alpha_pattern": [{"q_proj": 16}],
    "bnb_config_kwargs": [{"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "fp4"}],
    "model_config": [{"attention_dropout": 0.1}],
    "peft_layers_to_transform": [[0]],
    "peft_layers_pattern": [["layers"]],
    "peft_layer_replication": [[[0, 1], [0, 2]]],
    "peft_trainable_token_indices": [[3, 4]],
    "load_in_4bit": [True, False],
    "load_in_8bit": [True],
    "quantization_bit": [4, 8, 2],
    "quant_bits": [4],
    "quantization_type": ["nf4"],
    "bnb_4bit_quant_type": ["fp4"],
    "bnb_4bit_compute_dtype": ["bfloat16", "torch.bfloat16"],
    "bnb_4bit_quant_storage": ["uint8"],
    "deepspeed": [f"{HERE}/ds.json", DEEPSPEED],
    "ds_config": [{"zero_optimization": {"stage": 2}}],
    "zero_stage": [3, 0],
    "model_revision": ["main"],
    "revision_of_model": ["main"],
}
"""Their key -> values as their users write them. What is not listed is a switch, or a number."""

NOT_LOADED = {
    "model_revision": "a folder has no revision",
    "revision_of_model": "a folder has no revision",
    "key_mapping": "the checkpoint has no such keys",
    "peft_layers_pattern": "it goes with `layers_to_transform`",
    "local_dirs": "it concerns the hub",
    "peft": "PEFT wants scipy for LoftQ, which is not installed",
    "reward_model": "the checkpoint has a head of its own",
}
"""Keys whose advice is right and does not fit this model; it is validated all the same."""


OF_LATER_PEFT = {
    "lora_target_parameters",
    "peft_ensure_weight_tying",
    "peft_trainable_token_indices",
}
"""Keys of fields that peft 0.13 does not know."""


def samples(theirs: str) -> list[Any]:
    numbers = {"r": 4, "lora_r": 4, "lora_rank": 4, "lora_dim": 4, "lora.rank": 4}
    return VALUES.get(theirs) or ([numbers[theirs]] if theirs in numbers else [True, False])


CASES = [
    pytest.param(theirs, value, id=f"{theirs}-{number}")
    for theirs, spelling in SPELLINGS.items()
    if not spelling.instead
    for number, value in enumerate(samples(theirs))
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, an adapter of it, an archive of its weights and other files."""
    root = tmp_path_factory.mktemp("here")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "dtype": torch.bfloat16}
    folder = tiny_llama(root, name="model", **sizes)
    result = llmload.load({"model": str(folder), "lora": {"r": 2}})
    result.model.save_pretrained(root / "adapter")
    state = tiny_model("llama", hidden_size=64, intermediate_size=128).state_dict()
    torch.save({"step_idx": 1, "state": state, "metrics": {}}, root / "policy.pt")
    (root / "chat.jinja").write_text(TEMPLATE)
    (root / "ds.json").write_text(json.dumps(DEEPSPEED))
    return root


def advised(fix: str) -> dict[str, Any]:
    """Return the keys that an advice says to write; none where it says what else to do."""
    keys: dict[str, Any] = {}
    if fix.startswith("Write `") and "FILE" not in fix and "module:Class" not in fix:
        for text in re.findall(r"`([^`]+)`(?= and `|\.$)", fix):
            keys |= yaml.safe_load(text)
    return keys


@pytest.mark.parametrize(("theirs", "value"), CASES)
def test_the_advice_for_a_key_of_another_tool_loads(theirs: str, value: Any, here: Path) -> None:
    value = json.loads(json.dumps(value).replace(HERE, str(here)))
    path = tuple(theirs.split("."))
    fix = unknown_key(path, value, [], {}, SPELLINGS).fix
    assert fix.endswith(".")
    assert "..." not in fix
    keys = advised(fix)
    if not keys:
        assert re.match(r"Remove it|Save the template|Write `(dtype|auto_class|kbit)", fix), fix
        return
    spec = {"model": str(here / "model"), **keys}
    registry = llmload.create_registry()
    registry.validate(spec)
    if theirs in NOT_LOADED:
        return
    if "archive" in theirs and not hasattr(torch, "accelerator"):
        return  # torch 2.5 opens no pickle
    plan = llmload.plan(spec)
    if not IS_MODERN and ("kbit" in keys or theirs in OF_LATER_PEFT):
        return  # 4.51.3 quantises on accelerators only
    assert plan.errors == [], fix
    if "zero3" not in keys or keys["zero3"].get("stage") == 0:
        llmload.load(spec)


@pytest.mark.parametrize("theirs", [key for key, s in SPELLINGS.items() if s.instead])
def test_what_stands_there_instead_of_a_key_is_a_key_that_loads_or_none(
    theirs: str, here: Path
) -> None:
    fix = unknown_key((theirs,), True, [], {}, SPELLINGS).fix
    written = [yaml.safe_load(text) for text in re.findall(r"`([^`]+: [^`]+)`", fix)]
    assert written or fix.startswith(("Remove it", "Write its settings into `kbit`")), fix
    for keys in written:
        if keys == {"allow_pickle": True} or (NO_BITSANDBYTES and "kbit" in keys):
            continue  # the one changes nothing here, the other cannot be loaded
        llmload.load({"model": str(here / "model"), **keys})


def test_of_several_adapters_the_last_is_resumed_and_those_before_it_are_merged() -> None:
    for value in (["a", "b", "c"], "a,b,c"):
        assert unknown_key(("adapter_name_or_path",), value, [], {}, SPELLINGS).fix == (
            "Write `lora: {merge_first: [a, b], adapter: c}`."
        )


@pytest.mark.parametrize("theirs", [key for key, s in SPELLINGS.items() if not s.instead])
def test_null_asks_for_what_happens_without_the_key(theirs: str) -> None:
    fix = unknown_key(tuple(theirs.split(".")), None, [], {}, SPELLINGS).fix
    assert fix == "Remove it: that is what happens without it."


def test_a_value_too_long_to_repeat_is_moved_and_not_cut() -> None:
    names = [f"model.layers.{n}.self_attn.q_proj" for n in range(99)]
    assert unknown_key(("lora_target_modules",), names, [], {}, SPELLINGS).fix == (
        "Give its value to the key `target_modules` in `lora`."
    )
    assert unknown_key(("model_name_or_path",), "x" * 1000, [], {}, SPELLINGS).fix == (
        "Give its value to the key `model`."
    )


def test_qlora_is_lora_on_four_bits() -> None:
    assert unknown_key(("adapter",), "qlora", [], {}, SPELLINGS).fix == (
        "Write `kbit: {bits: 4}` and `lora: {}`."
    )
