"""The JSON schema of a spec or group, for editors: core keys and plugins' sections in one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from llmload.spec.docstrings import of_attributes
from llmload.spec.groupspec import ADAPTER_OF, LIKE, MODELS, NAME, AdapterSpec, GroupSpec
from llmload.spec.loadspec import LoadSpec

_SPEC: Final = {"$ref": "#/$defs/LoadSpec"}
_ABOUT: Final = ("description", "default", "title")
_WORDS: Final = {
    "array": "list",
    "boolean": "`true`, `false`",
    "integer": "whole number",
    "null": "`null`",
    "object": "mapping",
    "string": "text",
}
_BOUNDS: Final = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
}
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


def file_schema(
    sections: Mapping[str, type[BaseModel]], key_rules: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the draft 2020-12 schema of a file that is a spec, or a group with ``models``.

    :param sections: spec key -> pydantic model of the plugin that owns it.
    :param key_rules: what the key of that name can hold; with none, any text.
    """
    spec = json_schema(sections, key_rules)
    dialect, definitions = spec.pop("$schema"), spec.pop("$defs")
    adapter = AdapterSpec.model_json_schema()
    other = {"type": "string", "description": "The member that this one is like."}
    like = {
        "description": "A member like another one, and the keys in which it differs.",
        "type": "object",
        "properties": {LIKE: other, **spec["properties"]},
        "required": [LIKE],
        "additionalProperties": False,
    }
    group = {
        "title": "llmload group",
        "description": _first_paragraph(GroupSpec.__doc__),
        "type": "object",
        "properties": {
            MODELS: {
                "description": of_attributes(GroupSpec)[MODELS],
                "type": "object",
                "propertyNames": {"pattern": f"^{NAME}$"},
                "minProperties": 1,
                "additionalProperties": _by_key(ADAPTER_OF, adapter, _by_key(LIKE, like, _SPEC)),
            }
        },
        "additionalProperties": False,
    }
    return {
        "$schema": dialect,
        "title": "llmload spec or group",
        **_by_key(MODELS, group, _SPEC),
        "$defs": {"LoadSpec": spec, **definitions},
    }


def _by_key(key: str, with_it: dict[str, Any], without: dict[str, Any]) -> dict[str, Any]:
    """Choose between two schemas; a value that is no mapping has the key, and fails there."""
    return {"if": {"required": [key]}, "then": with_it, "else": without}


def _or_null(value: dict[str, Any]) -> dict[str, Any]:
    """Allow null, which is as if the key were not there."""
    about = {name: part for name, part in value.items() if name in _ABOUT}
    bare = {name: part for name, part in value.items() if name not in _ABOUT}
    return {**about, "anyOf": [bare, {"type": "null"}]}


def _first_paragraph(text: str | None) -> str:
    return (text or "").partition("\n\n")[0]


def json_schema(
    sections: Mapping[str, type[BaseModel]], key_rules: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the draft 2020-12 schema of a spec whose plugins are ``sections``.

    Definitions that sections share are there once; those of equal name are told apart by pydantic.

    :param sections: spec key -> pydantic model of the plugin that owns it.
    :param key_rules: what the key of that name can hold; with none, any text.
    """
    models: list[type[BaseModel]] = [LoadSpec, *sections.values()]
    references, document = models_json_schema([(model, "validation") for model in models])
    definitions: dict[str, Any] = document["$defs"]
    core = definitions.pop(references[LoadSpec, "validation"]["$ref"].rpartition("/")[2])
    properties = dict(core["properties"])
    if rules := sorted(key_rules):
        properties["key_rules"] = properties["key_rules"] | {"items": {"enum": rules}}
    for key, model in sections.items():
        reference = references[model, "validation"]
        described = definitions[reference["$ref"].rpartition("/")[2]].get("description", "")
        properties[key] = {**reference, "description": _first_paragraph(described)}
    for key in properties.keys() - set(core["required"]):
        properties[key] = _or_null(properties[key])
    return {
        "$schema": DIALECT,
        "title": "llmload spec",
        "description": _first_paragraph(core["description"]),
        "type": "object",
        "properties": properties,
        "required": core["required"],
        "additionalProperties": False,
        "$defs": definitions,
    }


class Key(BaseModel):
    """One key of a spec or section, as people are told of it."""

    name: str
    """As it is written."""
    takes: str
    """Its values in words, literal ones in backticks."""
    default: str
    """As YAML; ``required`` where there is none."""
    meaning: str
    """What it does."""


def keys(schema: Mapping[str, Any]) -> list[Key]:
    """Describe the properties of an object's JSON schema, in their order."""
    required = schema.get("required", ())
    return [
        Key(
            name=name,
            takes=in_words(field),
            default="required" if name in required else _as_yaml(field.get("default")),
            meaning=field.get("description", ""),
        )
        for name, field in schema.get("properties", {}).items()
    ]


def in_words(field: Mapping[str, Any]) -> str:
    """Say what a JSON schema takes: ``whole number ≥ 1 or `null` ``."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(map(in_words, _choices(field))))
    if "enum" in field:
        return ", ".join(f"`{_as_yaml(value)}`" for value in field["enum"])
    if "const" in field:
        return f"`{_as_yaml(field['const'])}`"
    if "$ref" in field:
        return f"`{field['$ref'].rpartition('/')[2]}`"
    if "pattern" in field and field.get("type", "string") == "string":
        return f"text like `{field['pattern']}`"
    kind = field.get("type")
    if kind == "array":
        items = field.get("items") or {"anyOf": field.get("prefixItems", [])}
        return f"list of {in_words(items)}" if items != {"anyOf": []} else "list"
    if kind == "object":
        values = field.get("additionalProperties")
        return f"mapping to {in_words(values if isinstance(values, dict) else {})}"
    if field.get("format") == "regex":
        return "regular expression"
    word = "anything" if kind is None else _WORDS.get(kind, kind)
    limits = [f"{sign} {field[bound]}" for bound, sign in _BOUNDS.items() if bound in field]
    return " ".join([word, ", ".join(limits)]).strip()


def _choices(field: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for choice in field["anyOf"]:
        if "anyOf" in choice:
            yield from _choices(choice)
        else:
            yield choice


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
