"""The command line by itself: start-up, surface, output, errors. Needs no ML stack."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import llmload
from llmload.cli import commands, environment
from llmload.host.registry import create_registry
from llmload.testing import FakeDistributions

HEAVY = ("accelerate", "bitsandbytes", "colossalai", "deepspeed", "numpy", "peft", "torch")
HEAVY += ("huggingface_hub", "safetensors", "tokenizers", "transformers")
BUILT_IN = {
    "dropout",
    "embeddings",
    "gradient_checkpointing",
    "kbit",
    "lora",
    "streaming",
    "tokenizer",
    "transformers",
}


def run(*arguments: str, text: str | None = None) -> Any:
    return CliRunner().invoke(commands.app, list(arguments), input=text)


def heavy_modules_after(code: str) -> list[str]:
    """Run ``code`` in a process of its own; return the heavy libraries that it imported."""
    listing = f"{code}\nimport sys\nprint([n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True, check=True
    )
    found: list[str] = json.loads(done.stdout.splitlines()[-1].replace("'", '"'))
    return found


# --- start-up -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", ["--help", "plugins", "schema", "validate spec.yaml"])
def test_a_light_command_imports_no_heavy_library(arguments: str, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("model: gpt2\nlora: {r: 4}\n")
    code = f"""
import os, sys
os.chdir({str(tmp_path)!r})
from llmload.cli import app
try:
    app({arguments.split()!r})
except SystemExit as stop:
    assert stop.code == 0, stop.code
"""
    assert heavy_modules_after(code) == []


def test_import_llmload_imports_no_heavy_library() -> None:
    assert heavy_modules_after("import llmload; llmload.load; llmload.create_registry()") == []


def test_help_imports_few_modules() -> None:
    code = """
import sys
from contextlib import redirect_stdout
from io import StringIO
sys.argv = ["llmload", "--help"]
from llmload.cli import app
try:
    with redirect_stdout(StringIO()):
        app()
except SystemExit:
    print(len(sys.modules))
"""
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Where it takes 0.13 s; each package of a model stack has more by itself.
    assert 100 < int(said) < 280


# --- surface ------------------------------------------------------------------------------------

OF_EVERY_COMMAND = {"--quiet", "--verbose", "-q", "-v"}
OPTIONS = {
    "cache": ["--dir", "--json", "action", "keys"],
    "compat": ["--json", "--plugin", "-p", "names"],
    "convert": ["--from", "--json", "--plugin", "--to", "-p", "file"],
    "explain": ["--json", "--plugin", "-p", "key"],
    "inspect": ["--all", "--json", "--plugin", "--set", "-p", "SPEC"],
    "targets": ["--json", "--plugin", "--set", "-p", "SPEC"],
    "lock": ["--json", "--output", "--plugin", "--set", "-o", "-p", "SPEC"],
    "new-plugin": ["--dir", "--json", "--kind", "name"],
    "verify": ["--json", "--lock", "--plugin", "--set", "-p", "SPEC"],
    "save": ["--json", "--max-shard-size", "--plugin", "--set", "--to", "-p", "SPEC"],
    "load": ["--json", "--plugin", "--report", "--set", "-p", "SPEC"],
    "plan": [
        "--device-memory",
        "--host-memory",
        "--json",
        "--optimizer",
        "--plugin",
        "--ranks",
        "--ranks-per-host",
        "--set",
        "-p",
        "SPEC",
    ],
    "validate": ["--json", "--plugin", "--set", "-p", "SPEC"],
    "plugins": ["--hooks", "--json", "--plugin", "-p"],
    "doctor": ["--json", "--plugin", "-p", "names"],
    "env": ["--json", "--plugin", "-p"],
    "schema": ["--json", "--plugin", "-p"],
    "demo": ["--dir", "--json", "--plugin", "--steps", "-p"],
}
PUBLIC = [
    "AdapterSpec",
    "AuditError",
    "CheckpointError",
    "Conflict",
    "Decline",
    "Group",
    "GroupPlan",
    "GroupReport",
    "GroupSpec",
    "InvalidValueError",
    "Line",
    "LlmloadError",
    "LoadContext",
    "LoadFailedError",
    "LoadResult",
    "LoadSpec",
    "Machine",
    "Note",
    "Plan",
    "PlanError",
    "PluginError",
    "Problem",
    "Registry",
    "Report",
    "RequestError",
    "Saved",
    "Section",
    "SpecError",
    "create_registry",
    "hookimpl",
    "hookspec",
    "load",
    "load_group",
    "plan",
    "plan_group",
    "save",
]
EXIT_CODES = {
    "AuditError": 1,
    "CheckpointError": 2,
    "LlmloadError": 1,
    "LoadFailedError": 1,
    "PlanError": 2,
    "PluginError": 2,
    "RequestError": 2,
    "SpecError": 2,
}


def test_commands_and_options_are_those_that_were_decided_upon() -> None:
    group = get_command(commands.app)
    found = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        words = [word for option in command.params for word in option.opts]
        found[name] = sorted("SPEC" if word == "spec" else word for word in words)
        assert set(words) >= OF_EVERY_COMMAND
        found[name] = [word for word in found[name] if word not in OF_EVERY_COMMAND]
    assert found == OPTIONS
    of_all = sorted(word for option in group.params for word in option.opts)
    assert of_all == ["--install-completion", "--show-completion", "--version"]


def test_public_names_and_exit_codes_are_those_that_were_decided_upon() -> None:
    assert sorted(llmload.__all__) == PUBLIC
    errors = [getattr(llmload, name) for name in PUBLIC if name.endswith("Error")]
    codes = {e.__name__: e.exit_code for e in errors if issubclass(e, llmload.LlmloadError)}
    assert codes == EXIT_CODES


def test_every_command_and_option_says_what_it_is_for() -> None:
    for command in get_command(commands.app).commands.values():  # type: ignore[attr-defined]
        assert command.help.endswith(".")
        assert all(option.help.endswith(".") for option in command.params)


def test_the_version_is_that_of_the_distribution() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"{llmload.__version__}\n")


# --- usage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "last_line"),
    [
        (["load"], "Error: Missing argument 'SPEC'."),
        (["laod", "x"], "No such command 'laod'."),
        (["load", "x", "--jsn"], "No such option: --jsn"),
        (["demo", "--steps", "0"], "Invalid value for '--steps'"),
        (["demo", "--steps", "ten"], "Invalid value for '--steps'"),
    ],
    ids=str,
)
def test_wrong_usage_exits_with_2(arguments: list[str], last_line: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    # The rest of the line is the parser's, and differs between its versions.
    assert last_line in result.stderr.splitlines()[-1]


def test_no_command_at_all_shows_the_help_and_exits_with_2() -> None:
    result = run()
    assert result.exit_code == 2
    assert re.search(r"validate +Check a spec by itself", result.output)


# --- validate and schema ------------------------------------------------------------------------


def test_a_valid_spec_is_given_back_as_it_was_understood(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("model: gpt2\nlora: {r: 4}\n")
    assert run("validate", str(file)).stdout == f"{file}: valid\n"
    result = run("validate", "--json", str(file))
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "valid": True,
        "spec": {"model": "gpt2", "lora": {"r": 4}},
    }


def test_a_valid_group_is_given_back_with_every_member_in_full(tmp_path: Path) -> None:
    file = tmp_path / "group.yaml"
    file.write_text(
        "models:\n  policy: {model: gpt2, lora: {r: 4}}\n"
        "  reference: {like: policy, lora: null, trainable: false}\n  off: {adapter_of: policy}\n"
    )
    assert run("validate", str(file)).stdout == f"{file}: valid\n"
    assert json.loads(run("validate", "--json", str(file)).stdout)["spec"]["models"] == {
        "policy": {"model": "gpt2", "lora": {"r": 4}},
        "reference": {"model": "gpt2", "trainable": False},
        "off": {"adapter_of": "policy"},
    }


def test_a_spec_is_read_from_standard_input() -> None:
    assert run("validate", "-", text="model: gpt2\n").stdout == "<stdin>: valid\n"
    result = run("validate", "-", text="model: gpt2\n\ndtype: bf16\n")
    assert result.exit_code == 2
    assert result.stderr == (
        "<stdin>:3:1: dtype: expected 'auto', 'float32', 'bfloat16' or 'float16', found 'bf16'."
        " Write bfloat16.\n"
    )


def test_the_schema_is_the_same_for_people_and_programs() -> None:
    text, data = run("schema"), run("schema", "--json")
    assert text.exit_code == data.exit_code == 0
    assert json.loads(text.stdout) == json.loads(data.stdout)
    spec = json.loads(data.stdout)["$defs"]["LoadSpec"]
    assert spec["properties"].keys() >= {"model", "lora", "dropout"}


def test_a_plugin_that_is_left_out_is_left_out_of_the_schema() -> None:
    schema = json.loads(run("schema", "-p", "no:lora").stdout)
    assert "lora" not in schema["$defs"]["LoadSpec"]["properties"]


# --- plugins ------------------------------------------------------------------------------------


def listed(*arguments: str) -> dict[str, dict[str, Any]]:
    result = run("plugins", "--json", *arguments)
    assert result.exit_code == 0
    return {entry["name"]: entry for entry in json.loads(result.stdout)["plugins"]}


def test_built_in_plugins_are_listed_like_others() -> None:
    entries = listed()
    assert {name for name, entry in entries.items() if entry["builtin"]} >= BUILT_IN
    assert entries["lora"] == {
        "name": "lora",
        "distribution": f"llmload {llmload.__version__}",
        "builtin": True,
        "status": "active",
        "reason": "",
        "section": True,
        "does": "Wraps the finished base model in a ``PeftModel``.",
        "hooks": ["check", "cost", "audit", "wrap_adapter"],
    }


def test_active_plugins_are_listed_in_plan_order() -> None:
    names = list(listed())
    assert names.index("tokenizer") < names.index("embeddings") < names.index("lora")
    assert names[-1] == "transformers"


def test_every_kind_of_plugin_is_listed_and_broken_ones_with_the_reason(
    llmload_distributions: FakeDistributions,
) -> None:
    good = "class Good:\n    name = 'good'\n"
    llmload_distributions.add("acme-good", {"good": "acme_good:Good"}, "acme_good", good)
    llmload_distributions.add("acme-bad", {"bad": "acme_bad:Bad"}, "acme_bad", "import nowhere\n")
    entries = listed("-p", "no:dropout")
    assert (entries["good"]["status"], entries["good"]["distribution"]) == (
        "active",
        "acme-good 1.0",
    )
    assert entries["dropout"]["status"] == "blocked"
    assert (entries["bad"]["status"], entries["bad"]["reason"]) == (
        "broken",
        "ModuleNotFoundError: No module named 'nowhere'",
    )
    table = run("plugins").stdout
    assert "acme-bad 1.0" in table
    assert "broken" in table


def test_the_table_of_plugins_can_be_read_where_a_distribution_has_a_long_name(
    llmload_distributions: FakeDistributions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    llmload_distributions.add(
        "acme-distribution-of-a-long-name",
        {"greeter": "acme_greeter:Greeter"},
        "acme_greeter",
        GREETER,
    )
    table = run("plugins").stdout
    assert "gradient_checkpointing" in table
    for word in ("Quantises", "checkpointing", "PeftModel", "floating-point"):
        assert word in table


def test_plugins_that_cannot_be_ordered_are_listed_with_the_circle() -> None:
    class First:
        name = "first"
        after = ("second",)

    class Second:
        name = "second"
        after = ("first",)

    found = environment.list_plugins(create_registry([First, Second]))
    assert {entry.name for entry in found.plugins} > {"first", "second"}
    (problem,) = found.problems
    assert problem.message.startswith("the plugins cannot be ordered: ")


def implementing(name: str) -> list[dict[str, Any]]:
    result = run("plugins", "--json", "--hooks", name)
    assert result.exit_code == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)["hooks"]
    return found


def test_who_implements_a_hook_is_told_in_order_with_the_way_to_the_code(
    llmload_distributions: FakeDistributions,
) -> None:
    source = """
import functools, llmload

def logged(function):
    @functools.wraps(function)
    def run(*args, **kwargs):
        return function(*args, **kwargs)
    return run

class Early:
    name = "early"
    stage = "load"

    @llmload.hookimpl
    @logged
    def post_load(self, ctx, model):
        return model

class Around:
    name = "around"
    stage = "last"

    @llmload.hookimpl(wrapper=True, specname="post_load")
    def look(self):
        return (yield)
"""
    points = {"early": "acme_module:Early", "around": "acme_module:Around"}
    llmload_distributions.add("acme", points, "acme_module", source)
    found = implementing("post_load")
    names = [entry["plugin"] for entry in found]
    assert names.index("early") < names.index("dropout") < names.index("around")
    mine = {entry["plugin"]: entry for entry in found if entry["distribution"] == "acme 1.0"}
    module = llmload_distributions.root / "acme_module.py"
    first = next(n for n, line in enumerate(source.splitlines(), 1) if "@llmload.hookimpl" in line)
    assert mine["early"]["code"] == f"{module}:{first}"
    assert (mine["early"]["wrapper"], mine["around"]["wrapper"]) == (False, True)
    line = next(
        x for x in run("plugins", "--hooks", "post_load").stdout.splitlines() if "around" in x
    )
    assert line.startswith(f"post_load  around (acme 1.0), wrapper  {module}:")


def test_hooks_that_plugins_declare_are_told_and_what_a_plugin_implements() -> None:
    assert "coati" in [entry["plugin"] for entry in implementing("lora_layer")]
    assert [entry["hook"] for entry in implementing("lora")] == [
        "check",
        "cost",
        "audit",
        "wrap_adapter",
    ]
    for entry in implementing("coati"):
        file, _, line = entry["code"].rpartition(":")
        assert "@hookimpl" in Path(file).read_text().splitlines()[int(line) - 1]


def test_a_hook_that_nobody_implements_is_told_too(
    llmload_distributions: FakeDistributions,
) -> None:
    source = """
import llmload

class Auction:
    name = "auction"

    class Hooks:
        @staticmethod
        @llmload.hookspec
        def bid(item): ...
"""
    llmload_distributions.add("acme", {"auction": "acme_module:Auction"}, "acme_module", source)
    result = run("plugins", "--hooks", "bid")
    assert (result.exit_code, result.stdout) == (0, "nobody\n")


@pytest.mark.parametrize(
    ("name", "fix"),
    [("post_laod", "Did you mean 'post_load'?"), ("drouput", "'dropout'?"), ("x", "Hooks are: ")],
)
def test_a_name_of_neither_hook_nor_plugin_is_refused(name: str, fix: str) -> None:
    result = run("plugins", "--hooks", name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"--hooks: {name!r} is neither a hook nor a plugin that works here." in result.stderr
    assert fix in result.stderr


# --- env ----------------------------------------------------------------------------------------


def test_the_environment_names_versions_and_plugins_but_no_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_doNotShowThis")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:doNotShowThis@hub.example/path")
    monkeypatch.setenv("LLMLOAD_PLUGINS", "no:lora")
    people, data = run("env"), run("env", "--json")
    assert people.exit_code == data.exit_code == 0
    assert "doNotShowThis" not in people.output + data.output
    described = json.loads(data.stdout)
    assert described["versions"]["llmload"] == llmload.__version__
    assert described["variables"]["HF_TOKEN"] == "set, not shown"
    assert described["variables"]["HF_ENDPOINT"] == "https://...@hub.example/path"
    assert f"python: {described['versions']['python']}" in people.stdout.splitlines()
    assert f"plugin lora (llmload {llmload.__version__}): blocked" in people.stdout.splitlines()


# --- errors -------------------------------------------------------------------------------------

GREETER = """
import sys
print("hello from a library")

class Greeter:
    name = "greeter"
"""


def test_what_a_library_prints_does_not_spoil_the_data(
    llmload_distributions: FakeDistributions,
) -> None:
    llmload_distributions.add(
        "acme-greeter", {"greeter": "acme_greeter:Greeter"}, "acme_greeter", GREETER
    )
    result = run("plugins", "--json")
    assert "greeter" in {entry["name"] for entry in json.loads(result.stdout)["plugins"]}
    assert result.stderr == "hello from a library\n"


def outcome(code: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, after ``code``."""
    program = f"from llmload import cli\nfrom llmload.host import registry\n{code}\ncli.main()"
    return subprocess.run(
        [sys.executable, "-c", program, "plugins"], capture_output=True, text=True, check=False
    )


def test_a_bug_is_shown_with_its_traceback_and_exits_with_1() -> None:
    done = outcome("registry.create_registry = lambda select: 1 / 0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_failed_load_is_shown_without_traceback_and_exits_with_1() -> None:
    done = outcome("""
from llmload import LoadFailedError
def fail(select):
    raise LoadFailedError("the plugin 'x' failed in `load`", fix="Report it.")
registry.create_registry = fail
""")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "the plugin 'x' failed in `load`. Report it.\n"


def test_an_interrupt_exits_with_130_and_says_nothing() -> None:
    done = outcome("""
def interrupt(select):
    raise KeyboardInterrupt
registry.create_registry = interrupt
""")
    assert (done.returncode, done.stdout) == (130, "")
    assert "Traceback" not in done.stderr


def test_the_command_is_installed() -> None:
    command = Path(sys.executable).with_name("llmload")
    done = subprocess.run(
        [command, "--version"], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout == f"{llmload.__version__}\n"


def test_a_fault_of_our_own_is_data_too_beside_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(registry: Any) -> Any:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(environment, "describe", fails)
    answer = run("env", "--json")
    assert answer.exit_code == 1
    assert isinstance(answer.exception, ZeroDivisionError)
    assert json.loads(answer.stdout) == {
        "error": "ZeroDivisionError",
        "problems": [{"message": "ZeroDivisionError: oh"}],
    }


# --- what the argument and --set ask for ---------------------------------------------------------


def validated(*arguments: str, text: str = "model: gpt2\nlora: {r: 8}\n") -> Any:
    """What ``validate --json`` understood of a spec on standard input."""
    shown = run("validate", "-", "--json", *arguments, text=text)
    assert shown.exit_code == 0, shown.stderr
    return json.loads(shown.stdout)["spec"]


def test_a_value_that_is_set_stands_in_place_of_the_specs() -> None:
    spec = validated("--set", "lora.r=4", "--set", "dropout.p=0.1", "--set", "dtype=bfloat16")
    assert spec == {
        "model": "gpt2",
        "dtype": "bfloat16",
        "dropout": {"p": 0.1},
        "lora": {"r": 4},
    }


def test_what_is_set_is_yaml_and_may_be_a_section_or_nothing() -> None:
    assert validated("--set", "lora={r: 2, lora_alpha: 4}")["lora"] == {"r": 2, "lora_alpha": 4}
    assert validated("--set", "lora=null") == {"model": "gpt2"}
    assert validated("--set", "lora=") == {"model": "gpt2"}


def test_a_member_of_a_group_can_be_set() -> None:
    group = "models: {policy: {model: a, lora: {r: 8}}, reference: {like: policy}}"
    shown = run("validate", "-", "--json", "--set", "models.policy.lora.r=4", text=group)
    assert json.loads(shown.stdout)["spec"]["models"]["policy"]["lora"]["r"] == 4


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lora.r=four", "--set lora.r=four: lora.r: expected a whole number, found 'four'"),
        ("lora.rr=4", "--set lora.rr=4: lora.rr: unknown key. Did you mean 'r'?"),
        ("lora=[1", "--set lora=[1:1:3: "),
        (
            "lora.r.x=4",
            "--set lora.r.x=4: there is no key 'x' in 8, which is no mapping. Set the whole value,"
            " written as YAML: `--set 'lora={r: 8}'`.",
        ),
        ("lora", "--set: 'lora' sets nothing. Write the key, `=` and the value: `--set lora.r=8`."),
        ("=4", "--set: '=4' sets nothing."),
        ("lora..r=4", "--set: 'lora..r=4' sets nothing."),
    ],
)
def test_a_wrong_setting_is_refused_by_its_own_words(setting: str, message: str) -> None:
    shown = run("validate", "-", "--set", setting, text="model: gpt2\nlora: {r: 8}\n")
    assert shown.exit_code == 2
    assert shown.stderr.startswith(message)
    assert shown.stdout == ""


def test_faults_of_the_file_keep_their_place_beside_those_of_settings() -> None:
    shown = run("validate", "-", "--set", "lora.r=x", text="model: gpt2\nlora: {alpha: 8}\n")
    first, second = shown.stderr.splitlines()
    assert first.startswith("--set lora.r=x: lora.r: ")
    assert second.startswith("<stdin>:2:8: lora.alpha: ")


def test_the_folder_of_a_model_and_a_hub_id_are_specs_of_nothing_else(tmp_path: Path) -> None:
    for model in (str(tmp_path), "org/some-model"):
        shown = run("validate", model, "--json")
        assert json.loads(shown.stdout)["spec"] == {"model": model}


def test_a_spec_file_that_is_not_there_is_not_taken_for_a_model() -> None:
    for name in ("sft", "sft.yaml", "configs/sft.yaml", "a/b/c", "./a", "x" * 5000, "a\0b"):
        assert run("validate", name).exit_code == 2, name


def test_help_has_a_short_name() -> None:
    assert run("plan", "-h").stdout == run("plan", "--help").stdout


@pytest.mark.parametrize("columns", ["80", "120"])
def test_help_is_cut_nowhere(columns: str) -> None:
    shown = CliRunner().invoke(commands.app, ["--help"], env={"COLUMNS": columns}).stdout
    assert max(map(len, shown.splitlines())) <= int(columns)
    listing = shown.partition("Commands:")[2]
    assert "..." not in listing
    assert " ".join(commands.plan.__doc__.split()) in " ".join(listing.split())


def test_the_table_of_plugins_says_what_each_does() -> None:
    shown = " ".join(run("plugins").stdout.split())
    assert "Wraps the finished base" in shown
