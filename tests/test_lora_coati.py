"""ColossalChat's lora_config.json, read into the section `lora`, its faults corrected by name.

What ColossalChat does is written down here from its code at 4f9953be3.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import load, needs_peft, refusal
from torch import nn

import llmload
from llmload.testing import tiny_checkpoint, tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


@pytest.fixture
def lora_config(tmp_path: Path) -> Any:
    """Writes a lora_config.json and returns the section that names it."""

    def write(**keys: Any) -> dict[str, str]:
        file = tmp_path / "lora_config.json"
        file.write_text(json.dumps(keys))
        return {"lora_config": str(file)}

    return write


def _layers(model: nn.Module) -> dict[str, Any]:
    base = model.get_base_model()  # type: ignore[operator]
    return {n: m for n, m in base.named_modules() if hasattr(m, "lora_A")}


def _as_coati_matches(model: nn.Module, targets: list[str] | None) -> list[str]:
    """Walk the children as ColossalChat's convert_to_lora_recursively does."""
    found = []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            adaptable = isinstance(child, nn.Linear | nn.Embedding)
            if adaptable and (targets is None or any(name in target for target in targets)):
                found.append(prefix + name)
            elif not adaptable:
                visit(child, f"{prefix}{name}.")

    visit(model, "")
    return found


@pytest.mark.parametrize(
    "targets",
    [
        None,
        ["q_proj", "v_proj"],
        ["self_attn.q_proj"],
        # By substring: "o_proj" occurs in the text, and so does "proj" in any of them.
        ["no_projection_o_proj", "embed_tokens"],
        ["gate_proj up_proj down_proj"],
    ],
    ids=str,
)
def test_the_layers_are_those_that_colossalchat_would_adapt(
    llama: Path, lora_config: Any, targets: list[str] | None
) -> None:
    base = llmload.load({"model": str(llama)}).model
    result = load(llama, lora_config(r=4, target_modules=targets))
    assert sorted(_layers(result.model)) == sorted(_as_coati_matches(base, targets))
    assert result.plan.facts["lora"]["targets"] == result.report.facts["lora"]["targets"]


def test_the_values_of_the_file_hold_for_linear_layers_too(llama: Path, lora_config: Any) -> None:
    section = lora_config(r=4, lora_alpha=8, linear_lora_dropout=0.25, target_modules=["q_proj"])
    for layer in _layers(load(llama, section).model).values():
        assert layer.scaling["default"] == 8 / 4
        assert layer.lora_dropout["default"].p == 0.25


def test_what_the_file_leaves_out_has_colossalchats_defaults(llama: Path, lora_config: Any) -> None:
    model = load(llama, lora_config(r=4)).model
    layer = _layers(model)["model.layers.0.self_attn.q_proj"]
    assert layer.scaling["default"] == 32 / 4
    assert layer.lora_dropout["default"].p == 0.1
    # Factors are float32 whatever the base: A within 1/sqrt(in) of zero, B zero.
    factor = layer.lora_A["default"].weight
    assert factor.dtype == torch.float32
    assert factor.shape == (4, 16)
    assert 0 < factor.abs().max() <= 16**-0.5
    assert not layer.lora_B["default"].weight.any()
    embedding = _layers(model)["model.embed_tokens"]
    assert not embedding.lora_embedding_A["default"].any()
    assert embedding.lora_embedding_B["default"].shape == (16, 4)


@pytest.mark.parametrize(
    ("asked", "peft"), [("none", "none"), ("all", "all"), ("lora", "lora_only")]
)
def test_pretrained_biases_are_kept_and_trained_as_asked(
    tmp_path: Path, lora_config: Any, asked: str, peft: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "opt", "opt")
    section = lora_config(r=4, lora_train_bias=asked, target_modules=["q_proj"])
    result = load(folder, section)
    biases = [
        n for n, p in result.model.named_parameters() if n.endswith("bias") and p.requires_grad
    ]
    expected = {
        "none": [],
        "lora": [n for n in dict(result.model.named_parameters()) if "q_proj.base_layer.bias" in n],
        "all": [n for n in dict(result.model.named_parameters()) if n.endswith("bias")],
    }
    assert biases == expected[asked]
    assert result.model.peft_config["default"].bias == peft


def test_pissa_is_colossalchats_with_the_alpha_of_the_file(llama: Path, lora_config: Any) -> None:
    section = lora_config(
        r=4, lora_alpha=16, lora_initialization_method="PiSSA", target_modules=["q_proj"]
    )
    base = llmload.load({"model": str(llama)}).model
    result = load(llama, section)
    for name, layer in _layers(result.model).items():
        scale = layer.scaling["default"]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        # B = U sqrt(S / scale) and A = sqrt(S / scale) V^T, so both have the same Gram matrix.
        assert scale == 16 / 4
        torch.testing.assert_close(a @ a.t(), b.t() @ b, atol=1e-3, rtol=0)
        whole = layer.base_layer.weight.float() + scale * b @ a
        torch.testing.assert_close(
            whole, base.get_submodule(name).weight.float(), atol=1e-3, rtol=1e-2
        )
    assert len(result.report.facts["lora"]["changed_base"]) == 2


def test_a_section_may_add_what_the_file_cannot_say(llama: Path, lora_config: Any) -> None:
    section = lora_config(r=4, target_modules=["q_proj"]) | {"use_dora": True, "r": 4}
    config = load(llama, section).model.peft_config["default"]
    assert (config.use_dora, config.r) == (True, 4)


# --- the plan -----------------------------------------------------------------------------------


def _notes(folder: Path, section: dict[str, str]) -> list[str]:
    return llmload.plan({"model": str(folder), "lora": section}).steps[-1].notes


def test_corrected_faults_are_named_in_the_plan(llama: Path, lora_config: Any) -> None:
    section = lora_config(r=4, target_modules=["q_proj"], embedding_lora_dropout=0.2)
    file = section["lora_config"]
    assert _notes(llama, section) == [
        "LoRA of rank 4, alpha 32 / r, on the layers that ColossalChat would adapt",
        f"{file} is read with its faults in ColossalChat corrected: lora_alpha 32 and"
        " linear_lora_dropout 0.1 hold for linear layers too (there always 32 and 0.0), and"
        " pretrained biases are kept (there they are dropped)",
        "embedding_lora_dropout 0.2 has no effect, as in ColossalChat: PEFT has no dropout on"
        " embeddings",
    ]
    section = lora_config(r=4, lora_alpha=4, lora_train_bias="all", target_modules=["q_proj"])
    assert _notes(llama, section)[1] == (
        f"{file} is read with its faults in ColossalChat corrected: lora_alpha 4 and"
        " linear_lora_dropout 0.1 hold for linear layers too (there always 32 and 0.0)"
    )


# --- files that cannot be meant -----------------------------------------------------------------

BAD_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "rank left out": (
        {"target_modules": ["q_proj"]},
        "{file}: r: a LoRA of rank 0 has no parameters. Give a rank of 1 or more, or remove the"
        " section `lora` to load without an adapter.",
    ),
    "rank 0": (
        {"r": 0},
        "{file}: r: a LoRA of rank 0 has no parameters. Give a rank of 1 or more, or remove the"
        " section `lora` to load without an adapter.",
    ),
    "another method": (
        {"r": 4, "lora_initialization_method": "gaussian"},
        "{file}: lora_initialization_method: expected 'kaiming_uniform' or 'PiSSA', found"
        " 'gaussian'",
    ),
    "a key of PEFT": (
        {"r": 4, "lora_dropout": 0.1},
        "{file}: lora_dropout: unknown key, known from PEFT, TRL, axolotl and LLaMA-Factory.",
    ),
    "names that are not there": (
        {"r": 4, "target_modules": ["query"]},
        "lora.lora_config: no linear or embedding layer of LlamaForCausalLM is named in its"
        " target_modules ['query']. Name layers as ColossalChat does, such as q_proj; it does not"
        " adapt transformers' Conv1D.",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_meant_is_refused(llama: Path, lora_config: Any, case: str) -> None:
    keys, message = BAD_FILES[case]
    section = lora_config(**keys)
    found = refusal(llama, section)
    assert found.startswith(message.replace("{file}", section["lora_config"]))
    assert "\n" not in found


def test_a_file_that_is_missing_or_no_object_is_refused(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "lora_config.json"
    section = {"lora_config": str(file)}
    assert refusal(llama, section) == (
        f"{file}: lora.lora_config: the file does not exist. Check the path."
    )
    file.write_text("r: 4")
    assert refusal(llama, section) == (
        f"{file}: lora.lora_config: the file is not JSON: Expecting value: line 1 column 1 (char"
        " 0). Check the file."
    )
    file.write_text("[4]")
    assert refusal(llama, section) == (
        f"{file}: lora.lora_config: expected a JSON object, found a list. Give the lora_config.json"
        " of a ColossalChat run."
    )


def test_a_section_that_contradicts_the_file_is_refused(llama: Path, lora_config: Any) -> None:
    section = lora_config(r=4, target_modules=["q_proj"])
    file = section["lora_config"]
    assert refusal(llama, section | {"r": 8, "lora_dropout": 0.0}) == (
        f"lora.r: the section says 8, and '{file}' says 4. Remove `r` from the section.\n"
        f"lora.lora_dropout: the section says 0.0, and '{file}' says 0.1. Remove `lora_dropout`"
        " from the section."
    )
    assert refusal(llama, section | {"target_modules": ["v_proj"]}) == (
        f"lora.target_modules: '{file}' says which modules are adapted. Remove `target_modules`"
        " from the section or `lora_config`."
    )


@needs_peft("0.18.0")
def test_all_layers_of_a_tied_model_reach_its_head_and_need_a_choice(
    tmp_path: Path, lora_config: Any
) -> None:
    folder = tiny_llama(tmp_path, tied=True)
    message = refusal(folder, lora_config(r=4))
    assert message.startswith("lora.tied_weights: the adapter reaches 'model.embed_tokens', whose")
    load(folder, lora_config(r=4) | {"tied_weights": "untie"})
