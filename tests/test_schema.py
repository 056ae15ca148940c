"""The JSON schema of a spec: one document, right for editors, in step with the models."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field

from llmload import LoadSpec, Section, SpecError
from llmload.spec import files
from llmload.spec.loadspec import validate
from llmload.spec.schema import json_schema


class Shared(Section):
    """A part that two sections have."""

    depth: int = 0
    """How deep."""


class Adapter(Section):
    """An adapter."""

    r: Annotated[int, Field(gt=0)] = 8
    """Rank."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Where."""
    shared: Shared | None = None
    """A part."""


class Required(Section):
    """A section with a key that must be there."""

    config: dict[str, Any]
    """A mapping."""
    shared: Shared = Shared()
    """A part."""


SECTIONS: dict[str, type[BaseModel]] = {"adapter": Adapter, "required": Required}
SCHEMA = json_schema(SECTIONS)


def accepted_by_models(data: dict[str, Any]) -> bool:
    try:
        validate(files.read(data), SECTIONS)
    except SpecError:
        return False
    return True


def test_it_is_valid_draft_2020_12_and_plain_json() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_it_has_every_core_key_and_every_section_and_nothing_else() -> None:
    assert list(SCHEMA["properties"]) == [*LoadSpec.model_fields, "adapter", "required"]
    assert SCHEMA["required"] == ["model"]
    assert SCHEMA["additionalProperties"] is False


def test_every_key_is_described_in_its_own_words() -> None:
    assert SCHEMA["description"] == (
        "One model to load. Keys that are not listed here belong to plugins, one key each."
    )
    parts = [SCHEMA, *SCHEMA["$defs"].values()]
    for part in parts:
        assert part["description"]
        for key, content in part["properties"].items():
            assert "$ref" in content or content["description"], key
    assert SCHEMA["$defs"]["Adapter"]["properties"]["r"]["description"] == "Rank."


def test_what_sections_share_is_defined_once() -> None:
    assert sorted(SCHEMA["$defs"]) == ["Adapter", "KeyExceptions", "Required", "Shared"]


def test_sections_whose_classes_have_one_name_are_told_apart() -> None:
    def plugin(field: str) -> SimpleNamespace:
        namespace = {"__annotations__": {field: int}, "__module__": f"plugin_{field}"}
        return SimpleNamespace(Section=type("Section", (Section,), namespace))

    one, two = plugin("a"), plugin("b")
    schema = json_schema({"one": one.Section, "two": two.Section})
    validator = Draft202012Validator(schema)
    assert validator.is_valid({"model": "m", "one": {"a": 1}, "two": {"b": 1}})
    assert not validator.is_valid({"model": "m", "one": {"b": 1}})
    assert not validator.is_valid({"model": "m", "two": {"a": 1}})


@pytest.mark.parametrize(
    ("data", "good"),
    [
        ({}, True),
        ({"model": ""}, False),
        ({"model": 1}, False),
        ({"model": None}, False),
        ({"revision": None}, True),
        ({"revision": 1}, False),
        ({"dtype": "bfloat16"}, True),
        ({"dtype": "bf16"}, False),
        ({"auto_class": "base"}, True),
        ({"auto_class": "my.module:Class"}, True),
        ({"auto_class": "AutoModel"}, False),
        ({"weights": "random"}, True),
        ({"weights": "none"}, False),
        ({"device_map": "cuda:0"}, True),
        ({"device_map": 0}, True),
        ({"device_map": {"": "cpu"}}, True),
        ({"device_map": True}, False),
        ({"device_map": ["cpu"]}, False),
        ({"cache_dir": "a"}, True),
        ({"cache_dir": ["a", "b"]}, True),
        ({"cache_dir": {"a": "b"}}, False),
        ({"trust_remote_code": "yes"}, False),
        ({"key_map": {"^a": "b"}}, True),
        ({"key_map": [["^a", "b"]]}, False),
        ({"key_map": {"^a": 1}}, False),
        ({"strict": False}, True),
        ({"strict": {"allow_missing": ["a"]}}, True),
        ({"strict": {"allow_missing": "a"}}, False),
        ({"strict": {"allow": ["a"]}}, False),
        ({"strict": "yes"}, False),
        ({"unheard_of": 1}, False),
        ({"adapter": {}}, True),
        ({"adapter": None}, True),
        ({"dtype": None}, True),
        ({"adapter": True}, False),
        ({"adapter": {"r": 0}}, False),
        ({"adapter": {"r": "8"}}, False),
        ({"adapter": {"r": True}}, False),
        ({"adapter": {"rank": 8}}, False),
        ({"adapter": {"target_modules": ["q", "v"]}}, True),
        ({"adapter": {"target_modules": "q"}}, False),
        ({"adapter": {"shared": {"depth": 1}}}, True),
        ({"adapter": {"shared": {"deep": 1}}}, False),
        ({"required": {}}, False),
        ({"required": {"config": {"a": [1, None]}}}, True),
        ({"required": {"config": []}}, False),
    ],
)
def test_schema_and_models_agree(data: dict[str, Any], good: bool) -> None:
    data = {"model": "gpt2", **data}
    assert Draft202012Validator(SCHEMA).is_valid(data) is good
    assert accepted_by_models(data) is good


@pytest.mark.parametrize(
    "data",
    [
        {"device_map": "cud:0"},
        {"key_map": {"(": "b"}},
        {"key_map": {"a": "\\1"}},
        {"strict": {"allow_missing": ["("]}},
    ],
)
def test_what_a_schema_cannot_say_only_the_models_refuse(data: dict[str, Any]) -> None:
    data = {"model": "gpt2", **data}
    assert Draft202012Validator(SCHEMA).is_valid(data)
    assert not accepted_by_models(data)
