"""What a model is made of, without reading it: the commands ``inspect`` and ``targets``."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors import safe_open
from typer.testing import CliRunner

from llmload.cli import commands
from llmload.loading import printed
from llmload.testing import tiny_checkpoint


def run(*arguments: str) -> Any:
    return CliRunner().invoke(commands.app, list(arguments), env={"COLUMNS": "80"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("inspected") / "llama", "llama")


def test_every_tensor_is_listed_as_safetensors_itself_tells_it(folder: Path) -> None:
    shown = json.loads(run("inspect", str(folder), "--json").stdout)
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                part = opened.get_slice(name)
                stored[name] = part.get_dtype(), tuple(part.get_shape())
    listed = {t["name"]: (t["dtype"], tuple(t["shape"])) for t in shown["tensors"]}
    assert listed == stored
    assert shown["files"] == {f.name: f.stat().st_size for f in folder.glob("*.safetensors")}
    assert shown["folder"] == str(folder)
    assert shown["config"]["model_type"] == "llama"
    assert shown["to_fetch"] == {}


def test_names_that_differ_in_their_numbers_are_one_line_unless_all_are_asked_for(
    folder: Path,
) -> None:
    text = run("inspect", str(folder)).stdout
    assert "model.layers.*.mlp.up_proj.weight (2)" in text
    assert "model.layers.0.mlp.up_proj.weight" not in text
    every = run("inspect", str(folder), "--all").stdout
    assert "model.layers.0.mlp.up_proj.weight" in every
    assert "model.layers.1.mlp.up_proj.weight" in every


def test_inspecting_imports_no_torch(folder: Path) -> None:
    code = (
        "import sys\nfrom llmload.cli import app\n"
        f"app(['inspect', {str(folder)!r}], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["inspect", "targets"])
def test_a_group_and_what_is_no_model_are_refused(command: str, tmp_path: Path) -> None:
    group = tmp_path / "group.yaml"
    group.write_text("models: {policy: {model: a}}\n")
    done = run(command, str(group))
    assert done.exit_code == 2
    assert "is a group of models, and this command takes one" in done.stderr
    done = run(command, str(tmp_path))
    assert done.exit_code == 2
    assert f"the folder {str(tmp_path)!r} holds no config.json" in done.stderr


def test_modules_are_grouped_by_class_and_pattern_with_all_that_is_theirs(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    shown = json.loads(run("targets", str(folder), "--json").stdout)
    own = {name for name, m in model.named_modules() if list(m.parameters(recurse=False))}
    assert {name for group in shown["modules"] for name in group["names"]} == own
    assert sum(group["parameters"] for group in shown["modules"]) == model.num_parameters()
    for group in shown["modules"]:
        for name in group["names"]:
            module = model.get_submodule(name)
            assert type(module).__name__ == group["kind"]
            for attribute, parameter in module.named_parameters(recurse=False):
                assert list(parameter.shape) in group["shapes"][attribute]
    up = next(group for group in shown["modules"] if group["pattern"].endswith("up_proj"))
    assert up["names"] == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert up["parameters"] == 2 * math.prod(up["shapes"]["weight"][0])
    assert up["adapted"] == 0


@pytest.mark.parametrize("model_type", ["gpt2", "t5"])
def test_a_tied_parameter_counts_once(model_type: str, tmp_path: Path) -> None:
    auto_class = "seq2seq_lm" if model_type == "t5" else "causal_lm"
    folder = tiny_checkpoint(tmp_path / model_type, model_type, auto_class=auto_class)
    spec = ("--set", f"auto_class={auto_class}")
    shown = json.loads(run("targets", str(folder), *spec, "--json").stdout)
    plan = json.loads(run("plan", str(folder), *spec, "--json").stdout)
    assert sum(group["parameters"] for group in shown["modules"]) == plan["parameters"]
    assert sum(group["nbytes"] for group in shown["modules"]) == plan["parameter_bytes"]


@pytest.mark.parametrize(
    ("settings", "pattern", "taken"),
    [
        (("lora.r=4",), "model.layers.*.self_attn.q_proj", 2),
        (("lora.r=4",), "model.layers.*.mlp.up_proj", 0),
        (("lora.r=4", "lora.target_modules=all-linear"), "model.layers.*.mlp.up_proj", 2),
        (("lora.r=4", "lora.layers_to_transform=[1]"), "model.layers.*.self_attn.q_proj", 1),
        (("lora.r=4", "lora.target_modules=all-linear"), "lm_head", 0),
    ],
)
def test_what_the_specs_lora_would_take_is_what_a_load_adapts(
    folder: Path, settings: tuple[str, ...], pattern: str, taken: int
) -> None:
    import llmload
    from llmload.cli import request
    from llmload.host.registry import create_registry

    options = [word for setting in settings for word in ("--set", setting)]
    done = run("targets", str(folder), *options, "--json")
    assert done.exit_code == 0, done.stderr
    shown = json.loads(done.stdout)
    group = next(group for group in shown["modules"] if group["pattern"] == pattern)
    assert group["adapted"] == taken
    adapted = sum(group["adapted"] for group in shown["modules"])
    spec = request.wanted(str(folder), settings, create_registry())
    model = llmload.load(spec).model
    assert adapted == sum(hasattr(module, "lora_A") for module in model.modules())
    text = run("targets", str(folder), *options).stdout
    assert ("1 of 2" in text) is (taken == 1)


def test_an_adapter_that_fits_nothing_is_refused_as_by_the_plan(folder: Path) -> None:
    done = run("targets", str(folder), "--set", "lora={r: 4, target_modules: [nowhere]}")
    assert done.exit_code == 2
    assert "nowhere" in done.stderr


def test_where_it_is_narrow_names_are_broken_behind_a_dot() -> None:
    console = Console(width=20, no_color=True)
    with console.capture() as captured:
        console.print(printed.Name("model.layers.*.self_attn.q_proj (4)"))
        console.print(printed.Name("lm_head"))
    assert captured.get().split() == ["model.layers.*.", "self_attn.q_proj", "(4)", "lm_head"]
    assert max(map(len, captured.get().splitlines())) == 20
