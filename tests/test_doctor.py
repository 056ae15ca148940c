"""``llmload doctor``: plugins tried out one by one, and how to get what does not work."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

import llmload
from llmload import hookimpl
from llmload.cli import commands, doctor
from llmload.errors import PluginError
from llmload.host.distributions import version_of
from llmload.loading import planning
from llmload.testing import FakeDistributions


def run(*arguments: str) -> Any:
    return CliRunner().invoke(commands.app, ["doctor", *arguments])


class Whole:
    name = "whole"

    @hookimpl
    def diagnose(self) -> Any:
        yield llmload.Note(text="does it all")


class Half:
    name = "half"

    @hookimpl
    def diagnose(self) -> Any:
        yield llmload.Note(text="does the one half")
        yield llmload.Problem(
            severity="warning", message="there is no other half", fix="Install it."
        )


class Useless:
    name = "useless"

    @hookimpl
    def diagnose(self) -> Any:
        return [llmload.Problem(message="there is no device", fix="Buy one.")]


class Silent:
    name = "silent"


class Raises:
    name = "raises"

    @hookimpl
    def diagnose(self) -> Any:
        yield llmload.Note(text="begins well")
        raise OSError("no such library")


class Babbles:
    name = "babbles"

    @hookimpl
    def diagnose(self) -> Any:
        yield "all is well"


class Wanting:
    name = "wanting"
    requires = ("no-such-distribution>=2",)

    @hookimpl
    def diagnose(self) -> Any:
        raise AssertionError("asked without what it needs")


def examined(*plugins: type) -> dict[str, doctor.Diagnosis]:
    registry = llmload.create_registry(plugins, autoload=False, environ={})
    found = doctor.examine(registry, [plugin.name for plugin in plugins])  # type: ignore[attr-defined]
    return {diagnosis.name: diagnosis for diagnosis in found.plugins}


def test_what_a_plugin_finds_decides_on_its_health() -> None:
    found = examined(Whole, Half, Useless, Silent, Raises, Babbles, Wanting)
    assert {name: diagnosis.health for name, diagnosis in found.items()} == {
        "whole": "works",
        "half": "works in part",
        "useless": "does not work",
        "silent": "works",
        "raises": "does not work",
        "babbles": "broken",
        "wanting": "does not work",
    }
    assert found["half"].works == ["does the one half"]
    said = {name: [str(p) for p in diagnosis.problems] for name, diagnosis in found.items()}
    assert said == {
        "whole": [],
        "half": ["there is no other half. Install it."],
        "useless": ["there is no device. Buy one."],
        "silent": [],
        "raises": ["tried out, it fails: OSError: no such library"],
        "babbles": [
            "it yielded a str from diagnose, which may yield llmload.Problem, llmload.Note. Report"
            " this to its makers."
        ],
        "wanting": [
            "wanting: the plugin needs no-such-distribution>=2, and none is installed. Install it"
            " with `pip install 'no-such-distribution>=2'`."
        ],
    }


def test_a_name_that_no_plugin_has_is_refused() -> None:
    registry = llmload.create_registry([Whole], environ={})
    with pytest.raises(PluginError) as caught:
        doctor.examine(registry, ["hole"])
    assert str(caught.value) == "there is no plugin 'hole'. Did you mean 'whole'?"
    assert run("hole").exit_code == 2


def test_without_the_ml_stack_no_load_works_and_the_way_to_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning, "version_of", lambda name: None)
    result = run("--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert [problem["message"] for problem in found["problems"]] == [
        "loading a model needs torch, which is not installed"
    ]
    assert found["problems"][0]["fix"] == "Install it with `pip install 'llmload[hf]'`."
    ours = [entry for entry in found["plugins"] if entry["distribution"].startswith("llmload ")]
    assert {entry["health"] for entry in ours} == {"does not work"}
    assert "loading a model needs torch" in run().stdout


def test_a_broken_plugin_is_named_and_the_exit_code_is_1(
    llmload_distributions: FakeDistributions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "version_of", lambda name: "1")
    monkeypatch.setenv("LLMLOAD_DISABLE_PLUGIN_AUTOLOAD", "1")
    llmload_distributions.add(
        "acme-bad", {"bad": "acme_bad:Bad"}, "acme_bad", "raise ImportError('gone')"
    )
    result = run("bad", "--json", "-p", "bad")
    (entry,) = json.loads(result.stdout)["plugins"]
    assert (entry["health"], result.exit_code) == ("broken", 1)
    assert "ImportError: gone" in entry["problems"][0]["message"]
    assert run("-p", "bad").exit_code == 1


def test_a_plugin_that_was_left_out_is_not_tried() -> None:
    result = run("lora", "--json", "-p", "no:lora")
    (entry,) = json.loads(result.stdout)["plugins"]
    assert (entry["health"], entry["works"], result.exit_code) == ("blocked", [], 1)


# --- on the stack that is installed ---------------------------------------------------------------


@pytest.fixture(scope="module")
def on_this_stack() -> dict[str, Any]:
    pytest.importorskip("transformers")
    result = run("--json")
    assert result.exit_code == 0, result.stderr
    entries = json.loads(result.stdout)["plugins"]
    return {entry["name"]: entry for entry in entries if "llmload" in entry["distribution"]}


def test_the_built_in_plugins_do_here_what_the_readme_says(on_this_stack: dict[str, Any]) -> None:
    import torch
    from stacks import IS_MODERN

    expected = {
        **dict.fromkeys(("dropout", "embeddings", "lora", "streaming"), "works"),
        **dict.fromkeys(("tokenizer", "transformers", "zero3"), "works"),
        "gradient_checkpointing": "works" if IS_MODERN else "works in part",
        "kbit": "works" if IS_MODERN or torch.cuda.is_available() else "does not work",
        "colossalai": "works in part" if IS_MODERN else "works",
    }
    if version_of("colossalai") is None:
        expected["colossalai"] = "does not work"
    found = {name: entry["health"] for name, entry in on_this_stack.items()}
    assert {name: found[name] for name in expected} == expected


def test_what_colossalai_can_do_here_is_said_with_the_way_to_the_rest(
    on_this_stack: dict[str, Any],
) -> None:
    from stacks import IS_MODERN

    if version_of("colossalai") is None:
        pytest.skip("colossalai is not installed")
    entry = on_this_stack["colossalai"]
    lazy = "lazy initialisation with colossalai 0.5.0"
    if not IS_MODERN:
        assert entry["works"] == [lazy, "models that stay lazy for Booster.boost"]
        assert entry["problems"] == []
        return
    assert entry["works"] == [lazy]
    (problem,) = entry["problems"]
    assert problem["message"].startswith("colossalai 0.5.0 does not give a Booster here: ")
    assert problem["fix"] == (
        "Install the colossalai stack in an environment of its own, in a clone of llmload with `pip"
        " install -c constraints/colossalai.txt '.[colossalai]'`, or use `materialize: true`."
    )


def test_one_plugin_is_tried_by_name() -> None:
    pytest.importorskip("transformers")
    result = run("streaming")
    assert result.exit_code == 0
    assert "reads each tensor once" in result.stdout
    assert "gradient_checkpointing" not in result.stdout
