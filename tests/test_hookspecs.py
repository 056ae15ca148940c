"""The manual is true: every hook is described, and every example in it runs as it stands."""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import llmload
import llmload.plugin
from llmload import hookspecs
from llmload.builtin.lora.hooks import Hooks
from llmload.cli import doctor
from llmload.errors import PlanError, SpecError
from llmload.loading import printed
from llmload.testing import tiny_checkpoint

HOOKS = (*hookspecs.HELPERS, *hookspecs.SPINE)


def example_of(hook: str) -> type:
    """Run the example in a hook's docstring and return the plugin class it defines."""
    text = inspect.getdoc(getattr(hookspecs, hook)) or ""
    block = re.search(
        r"^Example: .*?::\n\n((?:    .*\n|\n)+)", text + "\n", re.DOTALL | re.MULTILINE
    )
    assert block, f"{hook} has no example"
    namespace: dict[str, Any] = {}
    exec(compile(textwrap.dedent(block[1]), f"<example of {hook}>", "exec"), namespace)
    classes = [value for value in namespace.values() if inspect.isclass(value)]
    (plugin,) = (kind for kind in classes if not kind.__module__.startswith("llmload"))
    return plugin


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("hooks"))


def load_with_example(hook: str, folder: Path, **keys: Any) -> llmload.LoadResult:
    registry = llmload.create_registry([example_of(hook)], environ={})
    return llmload.load({"model": str(folder), **keys}, registry=registry)


def test_the_manual_describes_every_hook_and_nothing_else() -> None:
    marked = {
        name
        for name, value in vars(hookspecs).items()
        if inspect.isfunction(value) and hasattr(value, "llmload_spec")
    }
    assert marked == set(HOOKS)


def example_in(text: str, start: str) -> dict[str, Any]:
    """Run the block of code that follows a line which begins or ends so."""
    block = re.search(rf"{start}::\n\n((?:    .*\n|\n)+)", text + "\n")
    assert block, f"there is no example after {start!r}"
    namespace: dict[str, Any] = {}
    exec(compile(textwrap.dedent(block[1]), f"<{start}>", "exec"), namespace)
    return namespace


def test_what_a_plugin_shows_is_printed_with_plan_and_report(folder: Path) -> None:
    class Shows:
        name = "shows"

        @llmload.hookimpl
        def post_load(self, ctx: llmload.LoadContext, model: Any) -> Any:
            when = "planned" if ctx.rehearsing else "done"
            ctx.show(self.name, "mood", f"{when} with joy")
            return model

    registry = llmload.create_registry([Shows], environ={})
    result = llmload.load({"model": str(folder)}, registry=registry)
    console = Console(width=100)
    for part, text in (
        (printed.plan(result.plan), "planned with joy"),
        (printed.report(result.report), "done with joy"),
    ):
        with console.capture() as captured:
            console.print(part)
        assert re.search(rf"^mood +{text} *$", captured.get(), re.MULTILINE)
    (line,) = result.report.lines
    assert (line.plugin, line.label) == ("shows", "mood")


def test_a_hook_of_a_plugin_is_called_as_the_manual_says(folder: Path) -> None:
    example = example_in(inspect.getdoc(hookspecs) or "", r"wrapper=True\)``\)")
    plugins = [example["Auction"], example["Bidder"]]
    plan = llmload.plan({"model": str(folder)}, registry=llmload.create_registry(plugins))
    notes = [step.notes for step in plan.steps if step.plugin == "auction"]
    assert notes == [["bidder pays 7"]]


def test_the_manual_names_every_attribute_and_ability() -> None:
    text = inspect.getdoc(hookspecs) or ""
    known = ("Section", "always_active", "stage", "after", "before", "conflicts", "requires")
    for name in (*known, "provides", "key_rules", "rehearsed", "Hooks"):
        assert f"\n        {name} = " in text
    for ability in llmload.plugin.ABILITIES:
        assert f"``{ability}``" in text


def test_a_plugin_refuses_an_adapter_as_the_example_of_check_lora_does(folder: Path) -> None:
    text = inspect.getdoc(Hooks.check_lora) or ""
    plugin = example_in(text, "Example: a serving system that takes no adapter above a rank")
    registry = llmload.create_registry([plugin["Serving"]], environ={})
    asked = {"model": str(folder), "serving": {"max_rank": 4}}
    adapter = {"target_modules": ["q_proj"]}
    assert not llmload.plan(asked | {"lora": adapter | {"r": 4}}, registry=registry).errors
    (problem,) = llmload.plan(asked | {"lora": adapter}, registry=registry).errors
    assert str(problem) == "lora.r: ranks above 4 cannot be served. Use `r: 4` or less."
    assert problem.plugin == "serving"


@pytest.mark.parametrize("hook", HOOKS)
def test_every_argument_and_the_result_of_a_hook_are_described(hook: str) -> None:
    function = getattr(hookspecs, hook)
    text = inspect.getdoc(function) or ""
    for argument in inspect.signature(function).parameters:
        assert f":param {argument}:" in text
    assert ":returns:" in text


def test_example_of_map_keys_reads_a_head_of_its_own(folder: Path, tmp_path: Path) -> None:
    headed = tmp_path / "headed"
    shutil.copytree(folder, headed)
    weights = load_file(headed / "model.safetensors")
    weights["scorer.weight"] = torch.arange(16.0)[None]
    save_file(weights, headed / "model.safetensors", metadata={"format": "pt"})
    result = load_with_example("map_keys", headed, scorer={})
    assert torch.equal(result.model.scorer.weight, torch.arange(16.0)[None])
    assert result.report.warnings == []


def test_example_of_diagnose_looks_for_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = llmload.create_registry([example_of("diagnose")], environ={})
    found = {}
    for place in (None, "/usr/bin/notify-send"):
        monkeypatch.setattr("shutil.which", lambda name, place=place: place)
        (found[place],) = doctor.examine(registry, ["notify"]).plugins
    assert [str(problem) for problem in found[None].problems] == [
        "there is no program notify-send. Install libnotify."
    ]
    assert found["/usr/bin/notify-send"].works == ["tells the desktop when a load has ended"]


def test_example_of_check_stops_a_load_over_the_budget(folder: Path) -> None:
    assert load_with_example("check", folder, budget={"max_parameters": 100_000})
    with pytest.raises(PlanError) as caught:
        load_with_example("check", folder, budget={"max_parameters": 1_000})
    assert re.fullmatch(
        r"budget\.max_parameters: the checkpoint has [\d,]+ parameters, 1,000 are allowed\."
        r" Choose a smaller model or raise the budget\.",
        str(caught.value),
    )


def test_example_of_cost_counts_copies_of_what_is_trained(folder: Path) -> None:
    registry = llmload.create_registry([example_of("cost")], environ={})
    plan = llmload.plan({"model": str(folder), "before_training": {}}, registry=registry)
    assert plan.memory is not None
    (item,) = (item for item in plan.memory.items if item.plugin == "before_training")
    assert (item.what, item.nbytes, item.lasting) == ("copies", plan.parameter_bytes, True)


def test_example_of_relieve_offers_narrower_weights_where_they_do(folder: Path) -> None:
    registry = llmload.create_registry([example_of("relieve")], block=["kbit", "zero3"], environ={})
    spec = {"model": str(folder), "streaming": {"mapped": False}}
    size = llmload.plan(spec, registry=registry).parameter_bytes
    machine = llmload.Machine(host_memory=size - 1, optimizer="none")
    (problem,) = llmload.plan(spec, registry=registry, machine=machine).errors
    assert problem.fix == "Add `narrow: {}`."


def test_example_of_init_context_acts_on_the_build_and_is_over_afterwards(folder: Path) -> None:
    result = load_with_example("init_context", folder, default_device={"device": "cpu"})
    assert result.report.phases[1].name == "init_context"
    assert torch.get_default_device() == torch.device("cpu")


def test_example_of_load_builds_a_model_of_zeros(folder: Path) -> None:
    result = load_with_example("load", folder, weights="random", zeros={})
    assert result.report.loader == "zeros"
    assert all(not parameter.any() for parameter in result.model.parameters())


def test_example_of_load_declines_and_the_report_says_why(folder: Path) -> None:
    result = load_with_example("load", folder, zeros={})
    assert result.report.loader != "zeros"
    assert result.report.declined["zeros"] == "zeros replaces weights: it wants `weights: random`"


def test_example_of_post_load_freezes_the_first_layers(folder: Path) -> None:
    result = load_with_example("post_load", folder, freeze_layers={"first": 1})
    first, second = result.model.model.layers
    assert not any(p.requires_grad for p in first.parameters())
    assert all(p.requires_grad for p in second.parameters())
    assert not any(".layers.0." in name for name in result.plan.trainable_parameters or ())


def test_example_of_wrap_adapter_trains_its_own_weights_only(folder: Path) -> None:
    modules = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    result = load_with_example("wrap_adapter", folder, ia3=modules)
    trainable = {name for name, p in result.model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("ia3_l" in name for name in trainable)
    assert set(result.plan.new_parameters) == trainable


def test_example_of_wrap_adapter_refuses_a_second_adapter_system(folder: Path) -> None:
    modules = {"target_modules": ["k_proj"], "feedforward_modules": []}
    with pytest.raises(PlanError) as caught:
        load_with_example("wrap_adapter", folder, ia3=modules, lora={})
    assert str(caught.value) == (
        "lora: 'lora' cannot be combined with 'ia3': each of them puts an adapter around the model."
        " Remove `lora` or `ia3`."
    )


def test_example_of_distribute_moves_the_finished_model_to_shared_memory(folder: Path) -> None:
    result = load_with_example("distribute", folder, shared_memory={}, lora={})
    assert all(parameter.is_shared() for parameter in result.model.parameters())
    assert set(result.report.newly_initialised) == set(result.plan.new_parameters)


@pytest.mark.refused_late  # only the weights tell
def test_example_of_audit_refuses_weights_that_are_not_finite(folder: Path) -> None:
    class Poison:
        name = "poison"

        @llmload.hookimpl
        def post_load(self, ctx: Any, model: Any) -> Any:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = float("nan")
            return model

    registry = llmload.create_registry([example_of("audit"), Poison()], environ={})
    with pytest.raises(llmload.AuditError) as caught:
        llmload.load({"model": str(folder), "finite": {}}, registry=registry)
    assert str(caught.value) == (
        "lm_head.weight: the parameter holds NaN or infinity. Check the checkpoint, or load in a"
        " wider dtype."
    )


def test_example_of_stopped_writes_down_why_a_load_was_refused(
    folder: Path, tmp_path: Path
) -> None:
    refusals = {"file": str(tmp_path / "refusals.txt")}
    assert load_with_example("stopped", folder, refusals=refusals)
    with pytest.raises(llmload.CheckpointError):
        load_with_example("stopped", folder / "missing", refusals=refusals)
    with pytest.raises(SpecError):
        load_with_example("stopped", folder, refusals=refusals, dropout={"q": 1})
    with pytest.raises(PlanError):
        load_with_example("stopped", folder, refusals=refusals, lora={"target_modules": ["none"]})
    said = (tmp_path / "refusals.txt").read_text().splitlines()
    assert [line.split()[0] for line in said] == ["CheckpointError", "SpecError", "PlanError"]
    (tmp_path / "refusals.txt").unlink()
    group = {"models": {"a": {"model": str(folder)}, "b": {"model": "no", "refusals": refusals}}}
    with pytest.raises(llmload.RequestError):
        llmload.load_group(group, registry=llmload.create_registry([example_of("stopped")]))
    assert (tmp_path / "refusals.txt").read_text().startswith("CheckpointError models.b.model: ")
    with pytest.raises(SpecError):  # the error of the plugin itself is not in the way
        load_with_example("stopped", folder, refusals={}, dropout={"q": 1})


@pytest.mark.parametrize(("place", "told"), [("before", True), ("after", False)])
def test_stopped_is_told_of_an_earlier_plugin_whose_context_fails(
    folder: Path, tmp_path: Path, place: str, told: bool
) -> None:
    class Failing:
        name = "failing"

        @llmload.hookimpl
        def init_context(self, ctx: Any) -> None:
            raise RuntimeError("the disk is on fire")

    setattr(Failing, place, ("refusals",))
    file = tmp_path / "refusals.txt"
    registry = llmload.create_registry([example_of("stopped"), Failing()], environ={})
    with pytest.raises(llmload.LoadFailedError, match="the disk is on fire"):
        llmload.load({"model": str(folder), "refusals": {"file": str(file)}}, registry=registry)
    assert file.exists() == told
    if told:
        assert file.read_text().startswith("LoadFailedError plugin 'failing'")
