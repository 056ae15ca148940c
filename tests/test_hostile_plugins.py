"""A broken, slow, noisy or hostile plugin is named and isolated, and commands still work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from environments import Environment
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from typer.testing import CliRunner

import llmload
from llmload.cli import app
from llmload.errors import PluginError
from llmload.host import discovery
from llmload.testing import FakeDistributions, run_on_ranks, tiny_llama

PLUGIN = """
import llmload

class Hostile:
    name = "hostile"

    @llmload.hookimpl
    def check(self, ctx):
        yield llmload.Note(text="the plugin was here")
"""
IN_A_CIRCLE = PLUGIN + "    after = before = ('tokenizer',)\n"
MOVES = PLUGIN + "    after = ('embeddings',)\n    before = ('tokenizer',)\n"

HOSTILE = {
    "raises when imported": ("raise RuntimeError('not today')", "RuntimeError: not today"),
    "exits when imported": ("raise SystemExit(0)", "SystemExit: 0"),
    "interrupts": ("raise SyntaxError('odd')", "SyntaxError: odd"),
    "lacks a library": ("import of_nobody", "No module named 'of_nobody'"),
    "goes in a circle": (IN_A_CIRCLE, "its `after` and `before` go in a circle"),
    "moves others": (MOVES, "its `after` and `before` would move 'embeddings' before 'tokenizer'"),
    "raises when made": (
        PLUGIN + "    def __init__(self):\n        raise OSError('no disk')\n",
        "OSError: no disk",
    ),
}
COMMANDS = {
    "validate": ("validate", "SPEC"),
    "plan": ("plan", "SPEC"),
    "load": ("load", "SPEC"),
    "plugins": ("plugins",),
    "env": ("env",),
    "schema": ("schema",),
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("spec")
    file = place / "spec.json"
    file.write_text(json.dumps({"model": str(tiny_llama(place))}))
    return file


def hostile(fakes: FakeDistributions, source: str, name: str = "hostile") -> None:
    fakes.add("hostile-dist", {name: "hostile_module:Hostile"}, "hostile_module", source)


def said(words: tuple[str, ...], spec: Path) -> Any:
    found = CliRunner().invoke(
        app, [*(str(spec) if word == "SPEC" else word for word in words), "--json"]
    )
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("fault", HOSTILE)
def test_every_command_works_beside_a_broken_plugin(
    llmload_distributions: FakeDistributions, fault: str, command: str, spec: Path
) -> None:
    source, reason = HOSTILE[fault]
    hostile(llmload_distributions, source)
    answer = said(COMMANDS[command], spec)
    if command in ("plan", "plugins"):
        assert "hostile-dist 1.0" in json.dumps(answer)
        assert reason in json.dumps(answer)


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_broken_plugin_fails_the_load_that_names_it(
    llmload_distributions: FakeDistributions, fault: str
) -> None:
    source, reason = HOSTILE[fault]
    hostile(llmload_distributions, source)
    with pytest.raises(PluginError) as caught:
        llmload.create_registry(environ={}).validate({"model": "m", "hostile": {}})
    assert "plugin 'hostile' (hostile-dist 1.0) is broken: " in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_plugin_prints_is_kept_out_of_the_data(
    llmload_distributions: FakeDistributions, command: str, spec: Path
) -> None:
    noisy = "print('imported')\n" + PLUGIN.replace("yield", "print('asked')\n        yield")
    hostile(llmload_distributions, noisy)
    said(COMMANDS[command], spec)


def test_what_a_plugin_prints_when_imported_is_for_people(
    llmload_distributions: FakeDistributions, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile(llmload_distributions, "print('imported')\n" + PLUGIN)
    llmload.create_registry(environ={})
    assert capsys.readouterr() == ("", "imported\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_plugin_that_takes_a_built_ins_name_replaces_nothing(
    llmload_distributions: FakeDistributions, command: str, spec: Path
) -> None:
    hostile(llmload_distributions, PLUGIN.replace('"hostile"', '"tokenizer"'), "tokenizer")
    answer = said(COMMANDS[command], spec)
    if command == "plugins":
        assert "'tokenizer' is provided by hostile-dist 1.0 and llmload" in json.dumps(answer)


def test_two_plugins_that_contradict_each_other_are_left_out_and_named(
    llmload_distributions: FakeDistributions, spec: Path
) -> None:
    for name, other in (("one", "other"), ("other", "one")):
        source = PLUGIN.replace('"hostile"', f'"{name}"') + f"    after = ({other!r},)\n"
        llmload_distributions.add(
            f"{name}-dist", {name: f"{name}_module:Hostile"}, f"{name}_module", source
        )
    plan = llmload.plan(spec)
    assert not {"one", "other"} & plan.plugins.keys()
    told = [w.message for w in plan.warnings]
    assert any("'one' (one-dist 1.0) is broken" in message for message in told)
    assert any("its order contradicts others': " in message for message in told)
    chosen = llmload.create_registry(select=["one", "other"], environ={})
    with pytest.raises(PluginError, match="the plugins cannot be ordered: "):
        llmload.plan(spec, registry=chosen)


def test_a_plugin_that_takes_long_to_import_is_named(
    llmload_distributions: FakeDistributions,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ticks = iter(range(0, 10_000, 10))
    monkeypatch.setattr(discovery, "perf_counter", lambda: next(ticks))
    hostile(llmload_distributions, PLUGIN)
    llmload.create_registry(environ={})
    assert [record.getMessage() for record in caplog.records] == [
        "importing plugin 'hostile' (hostile-dist 1.0) took 10.0 s, which every command waits for;"
        " leave it out with `-p no:hostile`"
    ]


# --- in other processes -------------------------------------------------------------------------


def notes(spec: str) -> list[str]:
    plan = llmload.plan(spec)
    return [note for step in plan.steps if step.plugin == "hostile" for note in step.notes]


def test_an_installed_plugin_is_found_in_every_rank(
    llmload_distributions: FakeDistributions, spec: Path
) -> None:
    hostile(llmload_distributions, PLUGIN)
    assert run_on_ranks(notes, str(spec)) == [["the plugin was here"]] * 2


SCRIPT = """
import multiprocessing, os, sys
import llmload

def notes(spec):
    plan = llmload.plan(spec)
    return [note for step in plan.steps if step.plugin == "hostile" for note in step.notes]

if __name__ == "__main__":
    found = notes(sys.argv[1])
    if sys.argv[2:] == ["spawn"]:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found += pool.map(notes, [sys.argv[1]])[0]
    rank = os.environ.get("RANK", "0")
    with open(f"{__file__}.{rank}", "w") as file:
        file.write(repr(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["torchrun", "spawn"])
def test_an_installed_plugin_is_found_in_ranks_of_torchrun_and_in_spawned_workers(
    tmp_path: Path, spec: Path, way: str
) -> None:
    environment = Environment(tmp_path / "environment")
    hostile(FakeDistributions(environment.site), PLUGIN)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    if way == "torchrun":
        launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
        environment.run(*launcher, str(script), str(spec), cwd=tmp_path)
        found = [Path(f"{script}.{rank}").read_text() for rank in range(2)]
        assert found == ["['the plugin was here']"] * 2
    else:
        environment.run(str(script), str(spec), "spawn", cwd=tmp_path)
        assert Path(f"{script}.0").read_text() == repr(["the plugin was here"] * 2)


CELLS = (
    """
import sys
from pathlib import Path
import llmload
from llmload.testing import FakeDistributions

def found():
    plan = llmload.plan({spec!r})
    return [note for step in plan.steps if step.plugin == "hostile" for note in step.notes]

print(found())
""",
    """
source = Path({source!r}).read_text()
FakeDistributions(Path({site!r})).add("hostile-dist", {{"hostile": "m:Hostile"}}, "m", source)
""",
    "print(found())",
)


@pytest.mark.slow
def test_a_plugin_that_a_notebook_installs_is_found_by_its_next_cell(
    tmp_path: Path, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = Environment(tmp_path / "environment")
    kernel = tmp_path / "kernels" / "ours" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    command = [str(environment.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": command, "display_name": "ours"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    source = tmp_path / "source.txt"
    source.write_text(PLUGIN)
    here = {"spec": str(spec), "source": str(source), "site": str(environment.site)}
    cells = [new_code_cell(cell.format(**here)) for cell in CELLS]
    NotebookClient(new_notebook(cells=cells), kernel_name="ours", timeout=300).execute()
    said = ["".join(o.text for o in cell.outputs if o.name == "stdout") for cell in cells]
    # DeepSpeed of the old stack logs on standard output when it is first imported.
    assert [text.splitlines()[-1:] for text in said] == [["[]"], [], ["['the plugin was here']"]]


@pytest.mark.parametrize("value", ["failing:Plugin", "failing:Other", "nowhere:Plugin", "lorra"])
def test_a_wrong_environment_variable_is_told_in_words_by_every_command(
    llmload_distributions: FakeDistributions,
    monkeypatch: pytest.MonkeyPatch,
    spec: Path,
    value: str,
) -> None:
    source = "raise SystemExit(0)" if value == "failing:Plugin" else "Plugin = 1"
    (llmload_distributions.root / "failing.py").write_text(source)
    monkeypatch.setenv("LLMLOAD_PLUGINS", value)
    for words in COMMANDS.values():
        found = CliRunner().invoke(app, [str(spec) if word == "SPEC" else word for word in words])
        assert (found.exit_code, found.stdout) == (2, "")
        assert f"plugin {value!r} was selected" in found.stderr
