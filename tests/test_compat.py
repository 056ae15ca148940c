"""``llmload compat``: the table of what cannot be combined, held to what plans refuse."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from snippets import ROOT
from stacks import IS_MODERN
from typer.testing import CliRunner

import llmload
from llmload.cli import commands, doctor, environment
from llmload.host import tested
from llmload.testing import tiny_llama

SECTIONS: dict[str, dict[str, Any]] = {
    "cast": {"modules": {"norm": "float32"}},
    "coati": {},
    "colossalai": {},
    "dropout": {"p": 0.0},
    "embeddings": {},
    "gradient_checkpointing": {},
    "kbit": {},
    "lora": {"r": 2},
    "streaming": {},
    "tokenizer": {},
    "verify": {"finite": True},
    "zero3": {},
}
REGISTRY = llmload.create_registry(environ={})
TABLE = environment.compatibility(REGISTRY)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(commands.app, ["compat", *arguments], env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    return tiny_llama(tmp_path_factory.mktemp("compat"), pad=True, **sizes)


def errors(llama: Path, *names: str) -> set[str]:
    spec = {"model": str(llama), **{name: SECTIONS[name] for name in names}}
    if "coati" in names:
        spec.setdefault("lora", {})
    return {str(error) for error in llmload.plan(spec, registry=REGISTRY).errors}


def test_plans_refuse_the_pairs_of_sections_that_the_table_has_and_no_others(llama: Path) -> None:
    built_in = {info.name for info in REGISTRY.plugins if info.builtin}
    assert SECTIONS.keys() == built_in & set(TABLE.sections)
    alone = {name: errors(llama, name) for name in SECTIONS}
    for one, other in combinations(SECTIONS, 2):
        found = errors(llama, one, other) - alone[one] - alone[other]
        declared = TABLE.between(one, other)
        said = {f"{p.one}: {p.one!r} cannot be combined with {p.other!r}: {p.reason}. {p.fix}"
                for p in declared}  # fmt: skip
        assert found <= said, f"{one} and {other}: a plan refuses what the table does not have"
        if any(pair.works == "no" for pair in declared):
            assert found, f"{one} and {other}: the table has what no plan refuses"


def test_a_key_that_depends_is_refused_for_the_values_that_it_depends_on(llama: Path) -> None:
    (pair,) = TABLE.between("gradient_checkpointing", "trainable")
    assert pair.works == "depends"
    spec = {"model": str(llama), "gradient_checkpointing": {}}
    assert llmload.plan({**spec, "trainable": True}).errors == []
    (error,) = llmload.plan({**spec, "trainable": False}).errors
    assert pair.reason in error.message
    assert error.fix == pair.fix


class Prefix:
    """An adapter of its own, which cannot stand beside dropout."""

    name = "prefix"
    provides = ("adapter",)
    conflicts = (llmload.Conflict(key="dropout", reason="it has some", fix="Remove one."),)

    class Section(llmload.Section):
        """Nothing to say."""

    @llmload.hookimpl
    def wrap_adapter(self, ctx: llmload.LoadContext, model: Any) -> Any:
        return model


def test_what_an_installed_plugin_declares_is_in_the_table_and_in_plans(llama: Path) -> None:
    registry = llmload.create_registry([Prefix()], environ={})
    table = environment.compatibility(registry, ["prefix"])
    assert [(p.one, p.other, p.works, p.reason) for p in table.pairs] == [
        ("prefix", "dropout", "no", "it has some"),
        ("prefix", "lora", "no", "each of them puts an adapter around the model"),
    ]
    spec = {"model": str(llama), "prefix": {}, "dropout": {"p": 0.0}, "lora": {}}
    plan = llmload.plan(spec, registry=registry)
    assert {(error.where, error.fix) for error in plan.errors} == {
        ("prefix", "Remove one."),
        ("prefix", "Remove `prefix` or `lora`."),
    }


def test_every_built_in_plugin_says_how_far_it_works_on_each_stack() -> None:
    built_in = {info.name for info in REGISTRY.plugins if info.builtin}
    assert built_in == tested.ON_STACKS.keys()
    assert all(found.keys() == tested.STACKS.keys() for found in tested.ON_STACKS.values())
    for stack, versions in tested.STACKS.items():
        pinned = (ROOT / "constraints" / f"{stack}.txt").read_text(encoding="utf-8")
        for name, version in versions.items():
            assert re.search(rf"^{name}=={re.escape(version)}\b", pinned, re.MULTILINE), name


def test_what_the_doctor_finds_wanting_here_is_not_said_to_work_on_this_stack() -> None:
    stack = "modern" if IS_MODERN else "colossalai"
    for found in doctor.examine(REGISTRY, ()).plugins:
        if found.builtin and found.health != "works":
            assert tested.ON_STACKS[found.name][stack][0] != "yes", found


# --- the command ----------------------------------------------------------------------------------


def test_the_command_shows_what_cannot_be_combined_and_why() -> None:
    done = run("kbit", "cast")
    assert done.exit_code == 0
    assert re.search(r"cast +kbit +no +which weights are codes", done.stdout)
    assert "zero3" not in done.stdout
    assert "All other pairs go together." in done.stdout
    assert run("dropout", "tokenizer").stdout == "Nothing stands against them.\n"


def test_json_has_the_whole_table() -> None:
    found = json.loads(run("--json").stdout)
    pair = {"one": "cast", "other": "zero3", "works": "no", "plugin": "cast"}
    assert any(pair.items() <= each.items() for each in found["pairs"])
    assert {"section": "lora", "stack": "modern", "works": "yes", "reason": ""} in found["stacks"]


def test_a_key_that_no_spec_has_is_refused() -> None:
    done = run("quantize")
    assert done.exit_code == 2
    assert done.stderr.startswith("no spec has a key 'quantize'. ")
    assert run("lorra").stderr == "no spec has a key 'lorra'. Did you mean 'lora'?\n"
