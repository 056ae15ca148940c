"""Modules in another dtype than the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llmload
from llmload import hookimpl
from llmload.testing import losses, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("cast"), dtype=torch.bfloat16)


def load(folder: Path, modules: dict[str, str], *plugins: object, **keys: Any) -> Any:
    spec = {"model": str(folder), "cast": {"modules": modules}, **keys}
    return llmload.load(spec, registry=llmload.create_registry(plugins, environ={}))


def test_the_modules_named_are_cast_and_no_other(folder: Path) -> None:
    result = load(folder, {"norm": "float32"})
    plain = llmload.load({"model": str(folder)}).model
    for name, parameter in result.model.named_parameters():
        dtype = torch.float32 if "norm" in name else torch.bfloat16
        assert parameter.dtype == dtype, name
        assert torch.equal(parameter, plain.get_parameter(name).to(dtype))
    assert result.report.facts["cast"] == {"tensors": {"norm": 5}}
    assert result.plan.parameter_bytes == sum(p.nbytes for p in result.model.parameters())
    (notes,) = [step.notes for step in result.plan.steps if step.plugin == "cast"]
    assert notes == ["modules with 'norm' in their names in float32"]


def test_the_first_rule_that_is_found_holds_for_all_in_a_module(folder: Path) -> None:
    rules = {r"layers\.0\.mlp\.down": "float16", "mlp": "float32"}
    model = load(folder, rules).model
    layers = model.model.layers
    assert layers[0].mlp.down_proj.weight.dtype == torch.float16
    assert layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert layers[1].mlp.down_proj.weight.dtype == torch.float32
    assert layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


def test_tied_weights_stay_tied_and_parameters_stay_objects(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, tied=True, dtype=torch.bfloat16)
    model = load(folder, {"lm_head": "float32"}).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32


def test_buffers_are_cast_too_unless_they_hold_whole_numbers(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    model = load(folder, {"rotary": "float16"}).model
    assert model.model.rotary_emb.inv_freq.dtype == torch.float16


def test_an_adapter_keeps_its_own_dtype_and_trains_under_autocast(folder: Path) -> None:
    lora = {"r": 2, "target_modules": ["gate_proj"], "adapter_dtype": "bfloat16"}
    result = load(folder, {"norm|gate": "float32"}, lora=lora)
    layer = result.model.get_base_model().model.layers[0].mlp.gate_proj
    assert layer.base_layer.weight.dtype == torch.float32
    assert layer.lora_A["default"].weight.dtype == torch.bfloat16
    assert "gradients reach 4 of 4 trainable parameters" in result.report.audit
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, *_, last = losses(result.model, 5)
    assert last < first


def test_a_rule_that_matches_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(llmload.RequestError) as caught:
        load(folder, {"norm": "float32", "router": "float32"})
    assert str(caught.value) == (
        "cast.modules: no module of LlamaForCausalLM that holds floating-point tensors has 'router'"
        " in its name. Remove the rule, or write part of a name as `named_modules()` gives it."
    )


def test_no_rules_or_a_bad_one_are_refused(folder: Path) -> None:
    for modules, message in (
        ({}, "cast.modules: "),
        ({"norm": "float64"}, "cast.modules.norm: expected 'float32', 'bfloat16' or 'float16'"),
        ({"norm(": "float32"}, "cast.modules['norm(']: 'norm(' is not a regular expression"),
    ):
        with pytest.raises(llmload.SpecError) as caught:
            load(folder, modules)
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"kbit": {}}, "which weights are codes, and must not be cast, is known there"),
        (
            {"zero3": {"config": {"zero_optimization": {"stage": 3}}}},
            "DeepSpeed decides in which dtype it keeps the parts of a parameter",
        ),
        ({"colossalai": {}}, "a Booster gives all parameters the dtype of its plugin"),
    ],
    ids=["kbit", "zero3", "colossalai"],
)
def test_sections_that_set_dtypes_themselves_are_in_conflict(
    folder: Path, section: dict[str, Any], reason: str
) -> None:
    (key,) = section
    spec = {"model": str(folder), "cast": {"modules": {"norm": "float32"}}, **section}
    messages = [problem.message for problem in llmload.plan(spec).errors]
    assert f"'cast' cannot be combined with {key!r}: {reason}" in messages


class Undoes:
    """A plugin that casts back what ``cast`` did."""

    name = "undoes"
    after = ("cast",)

    @hookimpl
    def post_load(self, ctx: Any, model: nn.Module) -> nn.Module:
        return model.to(torch.bfloat16)


def test_a_plugin_that_casts_back_is_refused_by_the_plan(folder: Path) -> None:
    with pytest.raises(llmload.PlanError) as caught:
        load(folder, {r"model\.norm": "float32"}, Undoes)
    assert str(caught.value) == (
        "cast.modules: 'model.norm.weight' is bfloat16, float32 was planned. A plugin after `cast`"
        " changed it; report this to its makers."
    )
