"""Keys of saved adapters that are called otherwise than PEFT calls them, and heads they bring."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import load, refusal, same_state, save, three_losses
from safetensors.torch import load_file, save_file
from test_lora_merge_first import trained
from transformers import AutoModelForSequenceClassification

import llmload
from llmload.testing import IDS, tiny_llama

QV: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("keys"), pad=True)


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    made = load(llama, QV).model
    three_losses(made)
    return made


def renamed(model: Any, folder: Path, rename: Callable[[str], str]) -> Path:
    save(model, folder)
    tensors = {rename(key): value for key, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def named(name: str) -> Callable[[str], str]:
    return lambda key: key.replace(".weight", f".{name}.weight")


WRAPPED: dict[str, tuple[Callable[[str], str], str]] = {
    "compiled": (lambda k: k.replace(PREFIX, f"{PREFIX}_orig_mod."), "compiled"),
    "ddp around": (lambda k: f"module.{k}", "ddp"),
    "ddp inside": (lambda k: k.replace(PREFIX, f"{PREFIX}module."), "ddp"),
    "fsdp": (lambda k: k.replace(".self_attn", "._fsdp_wrapped_module.self_attn"), "fsdp"),
    "fabric": (lambda k: f"_forward_module.{k}", "fabric"),
    "checkpointing": (
        lambda k: k.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
        "activation_checkpointing",
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_adapter_is_refused_with_the_rule_that_mends_it(
    name: str, llama: Path, model: Any, tmp_path: Path
) -> None:
    rename, rule = WRAPPED[name]
    folder = renamed(model, tmp_path / "adapter", rename)
    assert refusal(llama, {"adapter": str(folder)}).startswith(
        f"lora.adapter: the adapter in '{folder}' lacks 'base_model.model.model.layers.0."
    )
    assert f". Write `key_rules: [{rule}]`, which takes away what wrappers put into its keys." in (
        refusal(llama, {"adapter": str(folder)})
    )
    assert same_state(load(llama, {"adapter": str(folder)}, key_rules=[rule]).model, model)


RENAMED: dict[str, tuple[Callable[[str], str], dict[str, str]]] = {
    "an adapter's name": (named("sft"), {r"(\.lora_\w+)\.sft(?=\.|$)": r"\1"}),
    "the default name": (named("default"), {r"(\.lora_\w+)\.default(?=\.|$)": r"\1"}),
    "no prefix": (lambda k: k.removeprefix("base_model.model."), {"^": "base_model.model."}),
}


@pytest.mark.parametrize("name", RENAMED)
def test_a_renamed_adapter_is_refused_with_the_renaming_that_mends_it(
    name: str, llama: Path, model: Any, tmp_path: Path
) -> None:
    rename, key_map = RENAMED[name]
    folder = renamed(model, tmp_path / "adapter", rename)
    ((pattern, replacement),) = key_map.items()
    assert f" Write `lora: {{key_map: {{'{pattern}': '{replacement}'}}}}`." in (
        refusal(llama, {"adapter": str(folder)})
    )
    found = load(llama, {"adapter": str(folder), "key_map": key_map}).model
    assert same_state(found, model)


def test_keys_of_another_architecture_are_mapped_and_merged(
    llama: Path, model: Any, tmp_path: Path
) -> None:
    folder = renamed(model, tmp_path / "adapter", lambda k: k.replace("model.layers", "body.h"))
    message = refusal(llama, {"adapter": str(folder)})
    assert " Its keys are 'base_model.model.body.h.0.self_attn.q_proj.lora_A.weight', " in message
    assert (
        " more: rename them with `lora: {key_map: ...}`, or check that model and adapter belong"
        " together." in message
    )
    section = {"adapter": str(folder), "key_map": {r"body\.h\.": "model.layers."}}
    assert same_state(load(llama, section).model, model)
    merged = load(llama, section | {"merge": True}).model
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected)


def test_a_renaming_that_cannot_be_meant_is_refused(
    llama: Path, model: Any, tmp_path: Path
) -> None:
    folder = save(model, tmp_path / "adapter")
    idle = refusal(llama, {"adapter": str(folder), "key_map": {"transformer": "model"}})
    assert idle.startswith(
        "lora.key_map['transformer']: the regular expression matches none of the 8 keys of the"
        " adapter, which are 'base_model.model.model.layers.0."
    )
    one = refusal(llama, {"adapter": str(folder), "key_map": {r"layers\.\d": "layers.0"}})
    assert one.startswith("lora.key_map: the keys 'base_model.model.model.layers.0.")
    assert "of the adapter would all be called 'base_model.model.model.layers.0." in one
    with pytest.raises(llmload.SpecError) as caught:
        load(llama, {"r": 2, "key_map": {"a": "b"}})
    assert str(caught.value) == (
        "lora: `key_map` renames the keys of a saved adapter, and none is named. Set `adapter` to"
        " its folder, or write the spec's own `key_map` for the model."
    )


CLASSIFIER: dict[str, Any] = {"auto_class": "sequence_classification"}
BASE: dict[str, Any] = {"allow_unexpected": ["lm_head"]}


def test_a_head_that_the_adapter_brings_need_not_be_in_the_checkpoint(
    llama: Path, tmp_path: Path
) -> None:
    strict = BASE | {"allow_missing": ["score"]}
    made = load(llama, {"r": 2}, strict=strict, **CLASSIFIER).model
    folder = trained(made, 3, tmp_path / "adapter")
    result = load(llama, {"adapter": str(folder)}, strict=BASE, **CLASSIFIER)
    head = "base_model.model.score.modules_to_save.default.weight"
    assert torch.equal(result.model.get_parameter(head), made.get_parameter(head))
    why = f"the adapter in '{folder}' brings it"
    assert result.report.newly_initialised["base_model.model.score.original_module.weight"] == why
    merged = load(llama, {"adapter": str(folder), "merge": True}, strict=BASE, **CLASSIFIER)
    assert torch.equal(merged.model.score.weight, made.get_parameter(head))
    assert merged.report.newly_initialised == {"score.weight": why}


def test_a_head_of_the_models_own_is_kept_beside_the_adapters(llama: Path, tmp_path: Path) -> None:
    own = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3)
    own.save_pretrained(tmp_path / "own")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / name, tmp_path / "own")
    made = load(tmp_path / "own", {"r": 2}, **CLASSIFIER).model
    adapter = trained(made, 3, tmp_path / "adapter")
    result = load(tmp_path / "own", {"adapter": str(adapter)}, **CLASSIFIER)
    assert same_state(result.model, made)
    score = result.model.get_base_model().score
    assert torch.equal(score.original_module.weight, own.score.weight)
    assert not torch.equal(score.modules_to_save["default"].weight, own.score.weight)
