"""A plugin that ``llmload new-plugin`` writes is created, installed, tested, built and used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from environments import Environment, pip
from typer.testing import CliRunner

from llmload.cli import app
from llmload.cli.new_plugin import KINDS
from llmload.testing import tiny_checkpoint

SECTIONS = {
    "model": {"first_try": {"first": 1}},
    "lora-layer": {"first_try": {"classes": ["TheirLinear"]}, "lora": {"r": 2}},
    "loader": {"first_try": {}},
}


def new_plugin(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["new-plugin", *words])
    return done.exit_code, done.stdout if done.exit_code == 0 else done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_plugin_is_created_installed_tested_built_and_used(tmp_path: Path, kind: str) -> None:
    folder, dist = tmp_path / "package", tmp_path / "dist"
    code, listed = new_plugin("first_try", "--kind", kind, "--dir", str(folder))
    assert code == 0
    assert {Path(line) for line in listed.split()} == {
        path for path in folder.rglob("*") if path.is_file()
    }
    assert not any(
        "my_plugin" in path.read_text() for path in folder.rglob("*.*") if path.is_file()
    )

    developed = Environment(tmp_path / "developed")
    developed.install(folder)
    tested = developed.run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=folder)
    assert "passed" in tested.stdout
    assert "failed" not in tested.stdout

    options = ("--no-deps", "--no-build-isolation", "--no-index", "-w", str(dist))
    pip(("wheel", *options, str(folder)))
    (wheel,) = dist.glob("*.whl")
    assert wheel.name == "llmload_first_try-0.1.0-py3-none-any.whl"
    used = Environment(tmp_path / "used")
    used.install(wheel)
    spec = tmp_path / "spec.json"
    model = tiny_checkpoint(tmp_path / "model")
    spec.write_text(json.dumps({"model": str(model), **SECTIONS[kind]}))
    plan = json.loads(used.run("-m", "llmload", "plan", str(spec), "--json", cwd=tmp_path).stdout)
    assert plan["plugins"]["first_try"] == "llmload-first-try 0.1.0"
    report = json.loads(used.run("-m", "llmload", "load", str(spec), "--json", cwd=tmp_path).stdout)
    assert (report["loader"] == "first_try") == (kind == "loader")
    listed = used.run("-m", "llmload", "plugins", cwd=tmp_path).stdout
    assert "llmload-first-try" in listed


def test_the_folder_is_named_after_the_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = new_plugin("first_try", "--json")
    assert code == 0
    assert "llmload-first-try/llmload_first_try/plugin.py" in json.loads(text)["files"]
    plugin = (tmp_path / "llmload-first-try" / "llmload_first_try" / "plugin.py").read_text()
    assert "class FirstTry:" in plugin


REFUSALS = {
    "no word": (("2nd",), "NAME: '2nd' cannot be the name of a plugin", "Choose a word of"),
    "an empty name": (("",), "NAME: '' cannot be the name", "Choose a word of"),
    "a keyword": (("class",), "NAME: 'class' cannot be the name", "Choose a word of"),
    "a path": (("../up",), "NAME: '../up' cannot be the name", "Choose a word of"),
    "other letters": (("größe",), "NAME: 'größe' cannot be the name", "Choose a word of"),
    "a dash": (("my-plugin",), "NAME: 'my-plugin' has other signs", "Write 'my_plugin'."),
    "capitals": (("MyPlugin",), "NAME: 'MyPlugin' has other signs", "Write 'myplugin'."),
    "a core key": (("dtype",), "NAME: 'dtype' is a core key of a spec", "Choose another name."),
    "a built-in": (("lora",), "has a plugin 'lora' already", "a plugin cannot replace another"),
    "a kind of nobody": (
        ("good", "--kind", "loaders"),
        "--kind: 'loaders' is no kind of plugin",
        "Did you mean 'loader'?",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_plugin_that_cannot_be_written_is_refused_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words, message, fix = REFUSALS[name]
    code, told = new_plugin(*words)
    assert code == 2
    assert message in told
    assert fix in told
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    code, told = new_plugin("first_try", "--dir", str(tmp_path))
    assert code == 2
    assert told == (
        f"{tmp_path}: the folder of the new plugin is there already. Name another with `--dir`, or"
        " remove it.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
