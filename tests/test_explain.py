"""What a key of a spec means: ``llmload explain``."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from llmload.cli import commands
from llmload.host.registry import create_registry
from llmload.spec.loadspec import LoadSpec
from llmload.spec.schema import in_words


def explained(*arguments: str) -> Any:
    done = CliRunner().invoke(commands.app, ["explain", *arguments, "--json"])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_without_a_key_every_key_of_a_spec_is_listed() -> None:
    names = {key["name"] for key in explained()["keys"]}
    assert names == {*LoadSpec.model_fields, *create_registry().sections}


def test_every_key_of_every_section_is_explained_as_its_model_says() -> None:
    for name, section in create_registry().sections.items():
        shown = explained(name)
        assert shown["plugin"] == f"{name}, llmload 0.1.0"
        assert [key["name"] for key in shown["keys"]] == list(section.model_fields)
        for key in shown["keys"]:
            field = section.model_fields[key["name"]]
            assert (key["default"] == "required") is field.is_required()
            assert key["meaning"], f"{name}.{key['name']}"
            assert key["takes"]


def test_a_key_inside_a_section_is_found_by_its_path() -> None:
    shown = explained("verify.signature.bundle")
    assert shown["default"] == "required"
    assert shown["takes"] == "text"
    assert shown["meaning"].startswith("The signature")


def test_a_section_says_what_it_needs_and_what_it_cannot_be_combined_with() -> None:
    shown = explained("zero3")
    assert "deepspeed>=0.19.4" in shown["needs"]
    assert any(line.startswith("device_map: ") for line in shown["conflicts"])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lorra", "a spec has no key 'lorra'. Did you mean 'lora'?\n"),
        ("lora.rr", "`lora` has no key 'rr'. Did you mean 'r'?\n"),
        (
            "lora.r.x",
            "`lora.r` has no keys in it, and 'x' was asked for. Ask for `llmload explain"
            " lora.r`.\n",
        ),
        (".", "a spec has no key ''."),
    ],
)
def test_a_key_that_there_is_not_is_refused_with_the_nearest(key: str, message: str) -> None:
    done = CliRunner().invoke(commands.app, ["explain", key])
    assert done.exit_code == 2
    assert done.stderr.startswith(message)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"anyOf": [{"anyOf": [{"type": "string"}, {"type": "null"}]}, {"type": "null"}]},
         "text or `null`"),
        ({"type": "integer", "minimum": 1, "maximum": 8}, "whole number ≥ 1, ≤ 8"),
        ({"enum": ["nf4", 4, True]}, "`nf4`, `4`, `true`"),
        ({"type": "array", "items": {"type": "string", "format": "regex"}},
         "list of regular expression"),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "mapping to number"),
        ({}, "anything"),
    ],
)  # fmt: skip
def test_a_schema_is_said_in_words(schema: dict[str, Any], words: str) -> None:
    assert in_words(schema) == words


def test_people_read_paragraphs_and_single_backticks() -> None:
    text = CliRunner().invoke(commands.app, ["explain", "zero3"], env={"COLUMNS": "100"}).stdout
    assert "``" not in text
    assert "Either `config` or the plain fields" in text
