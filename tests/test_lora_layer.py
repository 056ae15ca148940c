"""The hook lora_layer: plugins add adapter layers for module types that PEFT does not know."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import peft
import pytest
import torch
from adapters import save, three_losses
from odd_layers import Adapts, MakesOdd, OddLinear, OddLora

import llmload
from llmload.errors import LoadFailedError, PlanError, RequestError
from llmload.testing import IDS, FakeDistributions, tiny_llama

LORA: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 8,
    "target_modules": ["down_proj", "q_proj"],
    "rank_pattern": {"layers.1.mlp.down_proj": 3},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path)


def load(folder: Path, *plugins: Any, **lora: Any) -> llmload.LoadResult:
    registry = llmload.create_registry(plugins, environ={})
    return llmload.load({"model": str(folder), "lora": LORA | lora}, registry=registry)


def made_by(model: Any) -> dict[str, str]:
    found: dict[str, str] = model.peft_config["default"].to_dict()["llmload_plugins"]
    return found


def odd_layers(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, OddLora)]


def test_a_plugin_adapts_a_module_that_peft_refuses(folder: Path) -> None:
    with pytest.raises(RequestError, match="PEFT refuses this adapter: Target module OddLinear"):
        load(folder, MakesOdd)
    result = load(folder, MakesOdd, Adapts)
    down = "base_model.model.model.layers.{}.mlp.down_proj"
    assert odd_layers(result.model) == [down.format(0), down.format(1)]
    layers = [result.model.get_submodule(down.format(number)) for number in (0, 1)]
    assert [layer.r["default"] for layer in layers] == [2, 3]
    trainable = [name for name, p in result.model.named_parameters() if p.requires_grad]
    assert result.plan.trainable_parameters == trainable
    assert f"{down.format(0)}.lora_A.default.weight" in trainable
    losses = three_losses(result.model)
    assert losses[-1] < losses[0]


def test_what_no_plugin_takes_is_left_to_peft(folder: Path) -> None:
    model = load(folder, MakesOdd, Adapts).model
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert isinstance(layer, peft.tuners.lora.Linear)


def test_a_plugin_goes_before_peft_for_a_module_that_peft_knows(folder: Path) -> None:
    plain = load(folder, Adapts(torch.nn.Linear)).model
    assert len(odd_layers(plain)) == 4


def test_the_first_plugin_in_plan_order_wins(folder: Path) -> None:
    late = Adapts(OddLinear, name="a_late_one")
    late.after = ("adapts",)
    result = load(folder, MakesOdd, late, Adapts)
    assert made_by(result.model) == {"adapts": "given as an object"}


class Watches:
    """A wrapper of the hook: it sees every answer, and marks each layer that a plugin made."""

    name = "watches"

    def __init__(self) -> None:
        self.seen: list[str] = []

    @llmload.hookimpl(wrapper=True)
    def lora_layer(self, ctx: llmload.LoadContext, target: torch.nn.Module) -> Any:
        layer = yield
        if not ctx.rehearsing:
            self.seen.append(f"{type(target).__name__} -> {type(layer).__name__}")
            if layer is not None:
                layer.was_seen = True
        return layer


def test_a_wrapper_of_the_hook_goes_once_around_all_answers(folder: Path) -> None:
    watches = Watches()
    declines = Adapts(torch.nn.Embedding, name="a_plugin_that_declines")
    result = load(folder, MakesOdd, declines, Adapts, watches)
    assert sorted(watches.seen) == ["Linear -> NoneType"] * 2 + ["OddLinear -> OddLora"] * 2
    layers = [result.model.get_submodule(name) for name in odd_layers(result.model)]
    assert [layer.was_seen for layer in layers] == [True, True]
    # The wrapper made none of them, and need not be there when they are loaded again.
    assert made_by(result.model) == {"adapts": "given as an object"}


def test_a_wrapper_is_called_where_no_plugin_answers(folder: Path) -> None:
    watches = Watches()
    load(folder, watches, target_modules=["q_proj"], rank_pattern={})
    assert watches.seen == ["Linear -> NoneType"] * 2


def test_a_failure_of_a_wrapper_names_it(folder: Path) -> None:
    class Fails:
        name = "fails"

        @llmload.hookimpl(wrapper=True)
        def lora_layer(self) -> Any:
            yield
            raise ValueError("no")

    with pytest.raises(LoadFailedError, match="plugin 'fails' failed in lora_layer: ValueError"):
        load(folder, Fails, target_modules=["q_proj"], rank_pattern={})


def test_the_plugin_is_named_in_the_saved_adapter_and_asked_again(
    folder: Path, tmp_path: Path
) -> None:
    model = load(folder, MakesOdd, Adapts).model
    three_losses(model)
    adapter = save(model, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["llmload_plugins"] == {"adapts": "given as an object"}
    registry = llmload.create_registry([MakesOdd, Adapts], environ={})
    spec = {"model": str(folder), "lora": {"adapter": str(adapter)}}
    resumed = llmload.load(spec, registry=registry).model
    model.eval()
    assert torch.equal(resumed(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_without_the_plugin_the_adapter_is_refused_and_the_plugin_named(
    folder: Path, tmp_path: Path
) -> None:
    adapter = save(load(folder, MakesOdd, Adapts).model, tmp_path / "adapter")
    registry = llmload.create_registry([MakesOdd], environ={})
    plan = llmload.plan(
        {"model": str(folder), "lora": {"adapter": str(adapter)}}, registry=registry
    )
    assert str(plan.errors[0]) == (
        f"lora.adapter: the adapter in {str(adapter)!r} has layers made by the plugin 'adapts',"
        " which takes no part in this load. Install the distribution that provides it and select it"
        " with `-p adapts`; if it has a section, add `adapts: {}` to the spec."
    )


def refused(folder: Path, adapter: Path) -> llmload.Problem:
    """Return the one error of a plan without the plugin that made the adapter's layers."""
    registry = llmload.create_registry([MakesOdd], environ={})
    spec = {"model": str(folder), "lora": {"adapter": str(adapter)}}
    (problem,) = llmload.plan(spec, registry=registry).errors
    return problem


def test_without_its_distribution_the_refusal_says_what_to_install(
    folder: Path, tmp_path: Path, llmload_distributions: FakeDistributions
) -> None:
    llmload_distributions.add("odd-lora", {"adapts": "odd_layers:Adapts"}, version="1.2")
    adapter = save(load(folder, MakesOdd).model, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["llmload_plugins"] == {"adapts": "odd-lora 1.2"}
    shutil.rmtree(llmload_distributions.root)
    assert str(refused(folder, adapter)) == (
        f"lora.adapter: the adapter in {str(adapter)!r} has layers made by the plugin 'adapts' of"
        " odd-lora 1.2, which takes no part in this load. If you trust it, install it with"
        " `pip install 'odd-lora==1.2'`, and select it with `-p adapts`; if it has a section, add"
        " `adapts: {}` to the spec."
    )


def test_what_a_file_says_to_install_is_shown_only_where_it_is_a_plain_distribution(
    folder: Path, tmp_path: Path
) -> None:
    adapter = save(load(folder, MakesOdd, Adapts).model, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    saved = json.loads(file.read_text())
    for text in ("odd' --index-url https://evil 1.0", "a b 1", "odd 1\n", "", "given as an object"):
        file.write_text(json.dumps(saved | {"llmload_plugins": {"adapts": text}}))
        assert refused(folder, adapter).fix.startswith("Install the distribution that provides it")


def test_an_adapter_that_names_plugins_alone_is_read_as_llmload_0_1_0_wrote_it(
    folder: Path, tmp_path: Path
) -> None:
    adapter = save(load(folder, MakesOdd, Adapts).model, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps(saved | {"llmload_plugins": ["adapts"]}))
    spec = {"model": str(folder), "lora": {"adapter": str(adapter)}}
    registry = llmload.create_registry([MakesOdd, Adapts], environ={})
    assert len(odd_layers(llmload.load(spec, registry=registry).model)) == 2
    assert "the plugin 'adapts', which takes no part" in refused(folder, adapter).message


def test_plan_and_report_say_which_layers_a_plugin_made(folder: Path) -> None:
    result = load(folder, MakesOdd, Adapts)
    down = [f"model.layers.{number}.mlp.down_proj" for number in (0, 1)]
    for facts in (result.plan.facts, result.report.facts):
        assert facts["lora"]["made_by"] == {"adapts": down}
    plain = load(folder, target_modules=["q_proj"], rank_pattern={})
    assert plain.report.facts["lora"]["made_by"] == {}


def test_an_installed_plugin_is_found_again_in_another_process(
    folder: Path, tmp_path: Path, llmload_distributions: FakeDistributions
) -> None:
    llmload_distributions.add(
        "odd-lora", {"makes_odd": "odd_layers:MakesOdd", "adapts": "odd_layers:Adapts"}
    )
    adapter = save(load(folder).model, tmp_path / "adapter")
    code = f"""
        import llmload
        spec = {{"model": {str(folder)!r}, "lora": {{"adapter": {str(adapter)!r}}}}}
        model = llmload.load(spec).model
        print(sum(type(module).__name__ == "OddLora" for module in model.modules()))
    """
    places = [str(llmload_distributions.root), str(Path(__file__).parent)]
    path = f"import sys; sys.path[:0] = {places!r}"
    done = subprocess.run(
        [sys.executable, "-c", path + "\n" + dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split()[-1:] == ["2"], done.stderr


def test_an_adapter_without_layers_of_plugins_is_saved_as_peft_saves_it(
    folder: Path, tmp_path: Path
) -> None:
    adapter = save(load(folder, Adapts).model, tmp_path / "adapter")
    assert "llmload_plugins" not in json.loads((adapter / "adapter_config.json").read_text())


def test_a_plugin_that_adapts_takes_part_in_loads_without_an_adapter(folder: Path) -> None:
    registry = llmload.create_registry([Adapts], environ={})
    assert llmload.load({"model": str(folder)}, registry=registry).model is not None


class Wrong:
    name = "wrong"

    @llmload.hookimpl
    def lora_layer(self, target: Any) -> Any:
        return torch.nn.Identity()


class Failing:
    name = "failing"

    @llmload.hookimpl
    def lora_layer(self, target: Any) -> Any:
        raise ValueError("no such layer")


def test_what_is_no_adapter_layer_is_an_error_that_names_the_plugin(folder: Path) -> None:
    with pytest.raises(PlanError) as caught:
        load(folder, Wrong)
    assert str(caught.value) == (
        "plugin 'wrong': lora_layer returned a Identity, and must return a module that is a peft"
        " LoraLayer, or None"
    )


def test_an_error_in_the_hook_names_the_plugin(folder: Path) -> None:
    with pytest.raises(LoadFailedError) as caught:
        load(folder, Failing)
    assert str(caught.value) == "plugin 'failing' failed in lora_layer: ValueError: no such layer"


@pytest.mark.parametrize("damaged", [5, [5], {"adapts": 1}, {"a\u001b[2J": ""}, ["-p evil"]])
def test_a_damaged_list_of_plugins_is_refused(folder: Path, tmp_path: Path, damaged: Any) -> None:
    adapter = save(load(folder, MakesOdd, Adapts).model, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"llmload_plugins": damaged}))
    plan = llmload.plan({"model": str(folder), "lora": {"adapter": str(adapter)}})
    assert str(plan.errors[0]) == (
        f"{file}: lora.adapter: 'llmload_plugins' does not map names of plugins to their"
        " distributions. Save the adapter again."
    )
