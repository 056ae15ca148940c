"""The plugin ``bottleneck``: what it does, what it refuses, and that it keeps the contract."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import train_and_save
from safetensors.torch import load_file, save_file

import llmload
from llmload.testing import (
    IDS,
    assert_plugin,
    context_of,
    losses,
    run_on_ranks,
    same,
    tiny_checkpoint,
)
from llmload_bottleneck import save
from llmload_bottleneck.layers import bottlenecks, weights
from llmload_bottleneck.plugin import BottleneckPlugin

Checkpoints = Callable[..., Path]
SMALL = {"size": 4}
ELEMENTS = 2 * (16 * 4 + 4 + 4 * 16 + 16)
"""In the bottlenecks of two layers of width 16."""


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def trained(llmload_checkpoint: Checkpoints, tmp_path: Path) -> tuple[Path, Path, Any]:
    """A base, the folder of an adapter trained on it, and the model that was trained."""
    base = llmload_checkpoint()
    model = llmload.load({"model": str(base), "bottleneck": SMALL}).model
    losses(model, 3)
    save(model, tmp_path / "adapter")
    return base, tmp_path / "adapter", model.eval()


def test_the_plan_says_what_will_be_trained_before_a_weight_is_read(
    llmload_checkpoint: Checkpoints,
) -> None:
    plan = llmload.plan({"model": str(llmload_checkpoint()), "bottleneck": SMALL})
    assert not plan.problems
    assert plan.trainable == ELEMENTS
    assert {plan.new_parameters[name] for name in plan.trainable_parameters or ()} == {"bottleneck"}
    (step,) = [step for step in plan.steps if step.plugin == "bottleneck"]
    assert step.notes == ["bottlenecks of size 4 with gelu behind mlp"]
    (line,) = plan.lines
    assert line.text == "model.layers.*.mlp (2)"


@pytest.mark.parametrize(
    ("model_type", "target", "elements"),
    [
        ("llama", "mlp", ELEMENTS),
        ("llama", "layers.1.self_attn", ELEMENTS // 2),
        ("llama", "up_proj", 2 * (32 * 4 + 4 + 4 * 32 + 32)),
        ("gpt2", "mlp", ELEMENTS),
        ("opt", "fc2", ELEMENTS),
        ("t5", "DenseReluDense", 2 * ELEMENTS),
    ],
)
def test_the_model_starts_as_its_base_and_trains_nothing_else(
    llmload_checkpoint: Checkpoints, model_type: str, target: str, elements: int
) -> None:
    auto_class = "seq2seq_lm" if model_type == "t5" else "causal_lm"
    folder = llmload_checkpoint(model_type, auto_class=auto_class)
    spec = {"model": str(folder), "auto_class": auto_class, "dropout": {"p": 0.0}}
    section = {**SMALL, "target_modules": [target]}
    result = llmload.load(spec | {"bottleneck": section})
    model, base = result.model, llmload.load(spec).model
    assert result.report.trainable == elements
    batch = {"input_ids": IDS, "labels": IDS}
    with torch.no_grad():  # with gradients torch multiplies frozen weights in another way
        assert torch.equal(model(**batch).logits, base(**batch).logits)

    before = bits(model)
    first, *_, last = losses(model, 5)
    assert last < first
    changed = {name for name, value in bits(model).items() if not same(value, before[name])}
    assert changed == set(weights(model))


def test_a_saved_adapter_is_resumed_bit_by_bit(trained: tuple[Path, Path, Any]) -> None:
    base, folder, model = trained
    spec = {"model": str(base), "bottleneck": {"adapter": str(folder)}}
    result = llmload.load(spec)
    for name, value in weights(model).items():
        assert same(value, weights(result.model)[name])
    assert torch.equal(result.model(IDS).logits, model(IDS).logits)
    assert result.plan.trainable == ELEMENTS
    assert set(result.report.newly_initialised.values()) == {f"resumed from {str(folder)!r}"}
    content = json.loads((folder / "bottleneck_config.json").read_text())
    assert content["made_by"] == result.plan.plugins["bottleneck"]
    assert content["base"] == str(base)


def test_an_adapter_that_is_not_trained_further_is_frozen(
    trained: tuple[Path, Path, Any],
) -> None:
    base, folder, _ = trained
    spec = {"model": str(base), "bottleneck": {"adapter": str(folder)}, "trainable": False}
    result = llmload.load(spec)
    assert result.report.trainable == result.plan.trainable == 0


def test_a_policys_reference_is_the_same_model_without_it(
    llmload_checkpoint: Checkpoints,
) -> None:
    folder = str(llmload_checkpoint())
    policy = {"model": folder, "bottleneck": SMALL}
    spec = {"models": {"policy": policy, "reference": {"adapter_of": "policy"}}}
    plan = llmload.plan_group(spec)
    sizes = {name: member.parameters for name, member in plan.members.items()}
    assert sizes["policy"] - sizes["reference"] == ELEMENTS
    group = llmload.load_group(spec)
    model, reference = group["policy"].model, group["reference"].model
    base = llmload.load({"model": folder}).model
    with torch.no_grad():
        wanted = base(IDS).logits
    first, *_, last = losses(model, 3)
    assert last < first
    assert torch.equal(reference(IDS).logits, wanted)
    assert model.training
    assert not torch.equal(model.eval()(IDS).logits, wanted)


def test_a_base_in_four_bits_is_adapted_too(llmload_checkpoint: Checkpoints) -> None:
    pytest.importorskip("bitsandbytes")
    folder = llmload_checkpoint(hidden_size=64, intermediate_size=64)
    spec = {"model": str(folder), "dtype": "bfloat16", "kbit": {}, "bottleneck": SMALL}
    for problem in llmload.plan(spec).errors:
        if "refuses bitsandbytes here" in problem.message:
            pytest.skip(problem.message)
    model = llmload.load(spec).model
    first, *_, last = losses(model, 5)
    assert last < first


def test_under_zero3_two_ranks_train_and_save_one_adapter(
    llmload_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    base, folder, resumed = llmload_checkpoint(), tmp_path / "adapter", tmp_path / "resumed"
    spec = {"model": str(base), "bottleneck": SMALL}
    first, second = run_on_ranks(
        train_and_save, spec, str(folder), str(resumed), process_group=False
    )
    assert first == second
    assert first["partitioned"]
    assert first["planned"] == first["parameters"] == ELEMENTS
    assert first["losses"][1] < first["losses"][0]
    saved, again = (load_file(f / "bottleneck_model.safetensors") for f in (folder, resumed))
    assert sum(value.numel() for value in saved.values()) == ELEMENTS
    assert all(value.any() for value in saved.values())
    assert saved.keys() == again.keys()
    assert all(same(value, again[name]) for name, value in saved.items())
    # One process gets the same adapter out of the file.
    whole = llmload.load(spec | {"bottleneck": {"adapter": str(folder)}}).model
    assert all(same(value, saved[name]) for name, value in weights(whole).items())


REFUSALS: dict[str, tuple[dict[str, Any], str, str]] = {
    "a name of nothing": (
        {"target_modules": ["mpl"]},
        "no module of LlamaForCausalLM is called 'mpl'",
        "Names are mlp.",
    ),
    "a module that is never called": (
        {"target_modules": ["layers"]},
        "how wide the output of 'model.layers' is cannot be told: no forward calls it",
        "Name modules that a forward calls, such as each layer's mlp.",
    ),
    "a folder without an adapter": (
        {"adapter": "nowhere"},
        "the folder 'nowhere' holds no bottleneck_config.json",
        "Give a folder written by llmload_bottleneck.save.",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_done_is_refused_by_the_plan(
    llmload_checkpoint: Checkpoints, name: str
) -> None:
    section, message, fix = REFUSALS[name]
    plan = llmload.plan({"model": str(llmload_checkpoint()), "bottleneck": section})
    assert [(problem.message, problem.fix) for problem in plan.errors] == [(message, fix)]


def test_a_resumed_adapter_says_its_own_shape() -> None:
    with pytest.raises(llmload.SpecError) as refused:
        llmload.plan({"model": "m", "bottleneck": {"adapter": "a", "size": 4}})
    (problem,) = refused.value.problems
    assert problem.message == "the adapter says its own `size`"
    assert problem.fix == "Remove `size`, or `adapter` for a new one."


def test_lora_beside_it_is_refused(llmload_checkpoint: Checkpoints) -> None:
    spec = {"model": str(llmload_checkpoint()), "bottleneck": SMALL, "lora": {"r": 2}}
    (problem,) = llmload.plan(spec).errors
    assert "each of them puts an adapter around the model" in problem.message


def _lose(state: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del state["model.layers.0.mlp.bottleneck_adapter.up.bias"]


def _bring_a_weight_of_the_base(state: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    state["model.norm.weight"] = torch.ones(16)


def _widen(state: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    state["model.layers.0.mlp.bottleneck_adapter.up.bias"] = torch.ones(17)


def _store_integers(state: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    state["model.layers.0.mlp.bottleneck_adapter.up.bias"] = torch.ones(16, dtype=torch.int64)


def _ask_for_another_activation(state: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["shape"]["activation"] = "system"


def _say_nothing(state: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del config["shape"]


DAMAGES: dict[Callable[..., None], str] = {
    _lose: "lacks 'model.layers.0.mlp.bottleneck_adapter.up.bias'",
    _bring_a_weight_of_the_base: "holds 'model.norm.weight', which are not an adapter's",
    _widen: "the state dict has (17,), the model takes (16,)",
    _store_integers: "is stored as I64, which is no float",
    _ask_for_another_activation: "activation",
    _say_nothing: "shape",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_a_damaged_adapter_is_refused_by_the_plan(
    trained: tuple[Path, Path, Any], damage: Callable[..., None]
) -> None:
    base, folder, _ = trained
    weights_file, config_file = (
        folder / name for name in ("bottleneck_model.safetensors", "bottleneck_config.json")
    )
    state, config = load_file(weights_file), json.loads(config_file.read_text())
    damage(state, config)
    save_file(state, weights_file)
    config_file.write_text(json.dumps(config))
    plan = llmload.plan({"model": str(base), "bottleneck": {"adapter": str(folder)}})
    assert DAMAGES[damage] in str(plan.errors[0])


def test_the_audit_finds_an_adapter_that_was_changed_or_removed(
    llmload_checkpoint: Checkpoints,
) -> None:
    result = llmload.load({"model": str(llmload_checkpoint()), "bottleneck": SMALL})
    ctx = context_of(result.model)
    ctx.record("bottleneck", result.report.facts["bottleneck"])
    assert list(BottleneckPlugin().audit(ctx, result.model)) == []
    name, layer = next(bottlenecks(result.model))
    torch.nn.init.ones_(layer.up.bias)
    (changed,) = BottleneckPlugin().audit(ctx, result.model)
    assert changed.message == f"'{name}.up.bias' do not hold what the adapter starts with"
    result.model.model.layers[1].mlp._forward_hooks.clear()
    _, removed = sorted(BottleneckPlugin().audit(ctx, result.model), key=lambda p: "lost" in str(p))
    assert removed.message == "'model.layers.1.mlp' lost the adapter"


def test_the_readmes_snippet_prints_what_stands_under_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    code, printed = (
        re.search(rf"^```{kind}\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
        for kind in ("python", "text")
    )
    assert code is not None
    assert printed is not None
    tiny_checkpoint(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    exec(compile(code[1], "README.md", "exec"), {})
    # Importing DeepSpeed, where it is installed, prints a line before that.
    assert capsys.readouterr().out.endswith(printed[1])


def test_a_model_without_the_adapter_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Linear has no bottleneck adapter to save"):
        save(torch.nn.Linear(1, 1), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_plugin_keeps_the_contract() -> None:
    bad = [{"size": 0}, {"target_modules": []}, {"activation": "swish"}, {"adapter": ""}]
    assert_plugin(BottleneckPlugin, spec={"bottleneck": SMALL}, bad=bad)
