"""The demo: a model made, loaded and fine-tuned, and the commands `load` and `plan` on it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llmload.cli import commands, demo
from llmload.spec import files

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def few_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "FINE_TUNING_STEPS", 60)
        yield


def run(*arguments: str) -> Any:
    return CliRunner().invoke(commands.app, list(arguments))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder that a short demo left, and what it said."""
    folder = tmp_path_factory.mktemp("demo") / "kept"
    result = run("demo", "--json", "--steps", "20", "--dir", str(folder))
    assert result.exit_code == 0
    return folder, json.loads(result.stdout)


def test_the_small_model_and_its_adapter_learn(kept: tuple[Path, dict[str, Any]]) -> None:
    _, shown = kept
    assert shown["training"]["steps"] == 20
    assert shown["training"]["last_loss"] < shown["training"]["first_loss"]
    assert shown["fine_tuning"]["loss_after"] < shown["fine_tuning"]["loss_before"] - 0.5


def test_the_folder_is_an_ordinary_one_in_shards(kept: tuple[Path, dict[str, Any]]) -> None:
    folder, shown = kept
    names = {path.name for path in (folder / "model").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert shown["folder"] == str(folder)


def test_without_a_terminal_each_quarter_is_told_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "FINE_TUNING_STEPS", 4)
    monkeypatch.chdir(tmp_path)
    told = run("demo", "--steps", "8").stderr.splitlines()
    assert told[0] == "About a minute on two cores; model and spec will be in demo."
    assert [line for line in told if "training a small model" in line] == [
        f"training a small model: {done} of 8" for done in (0, 2, 4, 6)
    ]
    assert [line for line in told if "fine-tuning" in line] == [
        f"fine-tuning the adapter: {done} of 4" for done in (0, 1, 2, 3)
    ]
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"demo.yaml", "model"}


def test_a_folder_with_something_in_it_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = run("demo", "--dir", str(tmp_path))
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        f"{str(tmp_path)!r} exists and is not an empty folder."
        " Remove it, or give the name of a new folder: `--dir NAME`."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_spec_asks_for_tokenizer_embeddings_dropout_and_lora(
    kept: tuple[Path, dict[str, Any]],
) -> None:
    folder, shown = kept
    assert (folder / "demo.yaml").read_text() == shown["spec"]
    keys = files.parse(shown["spec"]).data.keys()
    assert keys >= {"tokenizer", "embeddings", "dropout", "lora"}
    assert shown["report"]["facts"]["tokenizer"]["new_tokens"] == {"<pad>": 1000}
    assert shown["report"]["facts"]["embeddings"]["rows"] == [1000, 1024]
    assert shown["plan"]["problems"] == []


def test_what_the_demo_kept_is_loaded_and_planned_again(
    kept: tuple[Path, dict[str, Any]],
) -> None:
    folder, shown = kept
    spec = str(folder / "demo.yaml")
    plan = run("plan", spec, "--json")
    assert plan.exit_code == 0
    assert json.loads(plan.stdout) == shown["plan"]
    report = run("load", spec, "--json")
    assert report.exit_code == 0
    assert json.loads(report.stdout)["audit"] == shown["report"]["audit"]


def test_plan_and_report_are_readable(kept: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = kept
    plan, report = (run(command, str(folder / "demo.yaml")) for command in ("plan", "load"))
    for line in (
        "model       LlamaForCausalLM, float32",
        "loader      streaming",
        "LoRA on     model.layers.*.self_attn.q_proj (4)",
        "new         56 tensors: lora",
    ):
        assert line in plan.stdout
    for line in (
        "56 parameters are trainable, as planned",
        "trainable params: 655,360 || all params: 1,770,624 || trainable%: 37.0129",
    ):
        assert line in report.stdout


def test_the_selected_plugins_are_those_that_load(kept: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = kept
    result = run("load", str(folder / "demo.yaml"), "--json", "-p", "no:streaming")
    assert json.loads(result.stdout)["loader"] == "transformers"


def test_an_adapter_that_learns_nothing_fails_the_demo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "ADAPTER_LEARNING_RATE", 0.0)
    monkeypatch.setattr(demo, "FINE_TUNING_STEPS", 1)
    random = torch.get_rng_state()
    result = run("demo", "--steps", "1", "--dir", str(tmp_path / "demo"))
    assert result.exit_code == 1
    assert "The loss did not fall.\n" in result.stdout
    assert torch.equal(torch.get_rng_state(), random)


def test_the_demo_as_it_is_ends_with_a_line_known_by_heart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "FINE_TUNING_STEPS", 240)
    result = run("demo", "--dir", str(tmp_path / "demo"))
    assert result.exit_code == 0
    # All three, where this was written; how far training comes is the processor's affair too.
    assert re.search(r"The loss fell, and [123] of 3 lines are known by heart\.", result.stdout)


def test_the_zen_is_complete_and_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = demo.zen_of_python()
    assert len(lines) == 19
    assert lines[0] == "Beautiful is better than ugly."
    assert capsys.readouterr().out == ""
