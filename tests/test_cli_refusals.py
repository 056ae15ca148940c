"""What the command line refuses: exit code 2, a clear message, no traceback, nothing left."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rich.style  # noqa: F401 - it draws at random as it is imported
from bad_groups import BAD_GROUPS
from bad_loads import BAD_LOADS, BadLoad
from bad_specs import BAD_SPECS, BadSpec
from typer.testing import CliRunner

import llmload
from llmload.cli import commands
from llmload.testing import snapshot, tiny_llama


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama, ``base``, and an adapter of it, ``adapter``."""
    root = tmp_path_factory.mktemp("origin")
    base = tiny_llama(root, name="base", shards=2)
    lora = {"r": 4, "target_modules": ["q_proj"]}
    result = llmload.load({"model": str(base), "lora": lora})
    result.model.save_pretrained(root / "adapter")
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of one command."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(load: BadLoad, origin: Path, here: Path) -> str:
    """Write folder and spec of a bad load into ``here``; returns the message to expect."""
    folder = here / "case" / "model"
    shutil.copytree(origin / "base", folder)
    shutil.copytree(origin / "adapter", here / "adapter")
    load.damage(folder)

    def filled(text: str) -> str:
        return text.replace("{folder}", str(folder)).replace("{parent}", str(folder.parent))

    (here / "spec.yaml").write_text(filled(load.text))
    return filled(load.message)


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")}


def assert_refused(arguments: list[str], message: str, here: Path) -> None:
    """Run a command and hold it to the message; files and global state must not move."""
    before, written = snapshot(), files(here)
    result = CliRunner().invoke(commands.app, arguments)
    assert result.stderr == message + "\n"
    assert result.stdout == ""
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert files(here) == written
    assert snapshot() == before


def test_there_are_more_than_120_refusals() -> None:
    assert len(BAD_LOADS) + len(BAD_SPECS) > 120


@pytest.mark.parametrize("load", BAD_LOADS, ids=lambda load: load.name)
def test_a_bad_load_is_refused(load: BadLoad, origin: Path, here: Path) -> None:
    message = prepare(load, origin, here)
    assert_refused(["load", "spec.yaml"], message, here)


@pytest.mark.parametrize("load", BAD_LOADS, ids=lambda load: load.name)
def test_the_plan_of_a_bad_load_says_the_same(load: BadLoad, origin: Path, here: Path) -> None:
    message = prepare(load, origin, here)
    try:
        said = "\n".join(map(str, llmload.plan("spec.yaml").errors))
    except llmload.RequestError as error:
        said = str(error)
    assert said == message


@pytest.mark.parametrize("spec", [*BAD_SPECS, *BAD_GROUPS], ids=lambda spec: spec.name)
@pytest.mark.parametrize("command", ["load", "validate"])
def test_a_bad_spec_is_refused(spec: BadSpec, command: str, here: Path) -> None:
    content = spec.text if isinstance(spec.text, bytes) else spec.text.encode()
    (here / spec.file).write_bytes(content)
    assert_refused([command, spec.file], spec.message, here)


SELECTIONS = {
    "plugin that is not installed": (
        ["-p", "lorra"],
        "plugin 'lorra' was selected, but no installed distribution provides it. Did you mean"
        " 'lora'?",
    ),
    "plugin that cannot be imported": (
        ["-p", "no_such_module:Plugin"],
        "plugin 'no_such_module:Plugin' was selected, but cannot be imported: No module named"
        " 'no_such_module'. Write it as `module:attribute`, and check that the module is on the"
        " path.",
    ),
    "something that is no plugin": (
        ["-p", "collections:OrderedDict"],
        "an object of type OrderedDict is not a plugin: it has no `name`. Give it a class attribute"
        " `name`, its key in the spec.",
    ),
    "section without its plugin": (
        ["-p", "no:lora"],
        "lora: the spec has the section 'lora', but the plugin 'lora' (llmload 0.1.0) is blocked."
        " Remove the section or the block `no:lora`.",
    ),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_bad_choice_of_plugins_is_refused(name: str, origin: Path, here: Path) -> None:
    options, message = SELECTIONS[name]
    (here / "spec.yaml").write_text(f"model: {origin / 'base'}\nlora: {{r: 4}}\n")
    assert_refused(["load", "spec.yaml", *options], message, here)


def test_a_demo_is_not_written_over_other_files(here: Path) -> None:
    (here / "kept").mkdir()
    (here / "kept" / "notes.txt").write_text("mine")
    assert_refused(
        ["demo", "--dir", "kept"],
        "'kept' exists and is not an empty folder. Remove it, or give the name of a new folder:"
        " `--dir NAME`.",
        here,
    )


def test_a_plan_with_errors_is_shown_whole_and_exits_with_2(origin: Path, here: Path) -> None:
    (here / "spec.yaml").write_text(
        f"model: {origin / 'base'}\nlora: {{target_modules: [query]}}\n"
    )
    result = CliRunner().invoke(commands.app, ["plan", "--json", "spec.yaml"])
    assert result.exit_code == 2
    plan = json.loads(result.stdout)
    assert plan["model_class"] == "LlamaForCausalLM"
    assert [problem["where"] for problem in plan["problems"]] == ["lora.target_modules"]


def test_with_json_the_problems_are_data_and_text(here: Path) -> None:
    (here / "spec.yaml").write_text("model: gpt2\ndtpye: float32\n")
    result = CliRunner().invoke(commands.app, ["load", "--json", "spec.yaml"])
    assert result.exit_code == 2
    assert json.loads(result.stdout) == {
        "error": "SpecError",
        "problems": [
            {
                "message": "unknown key",
                "fix": "Did you mean 'dtype'?",
                "where": "dtpye",
                "file": "spec.yaml",
                "line": 2,
                "column": 1,
            }
        ],
    }
    assert result.stderr == "spec.yaml:2:1: dtpye: unknown key. Did you mean 'dtype'?\n"


@pytest.mark.parametrize("name", ["truncated shard", "pickle alone", "rank 0"])
def test_a_process_of_its_own_says_the_same(name: str, origin: Path, here: Path) -> None:
    (load,) = (load for load in BAD_LOADS if load.name == name)
    message = prepare(load, origin, here)
    done = subprocess.run(
        [sys.executable, "-c", "from llmload.cli import main; main()", "load", "spec.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    # Libraries may greet on standard error when they are imported; the refusal comes last.
    assert done.stderr.endswith(message + "\n")
    assert "Traceback" not in done.stderr
