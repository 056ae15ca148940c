"""Sections made up from their own types: one that should be right, and many that may be wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel


def section_of(section: type[BaseModel]) -> dict[str, Any]:
    """Return the smallest section that the model takes: what has no default, by example or type.

    :raises ValidationError: the types do not say enough; give the fields ``examples``.
    """
    schema = section.model_json_schema()
    made = _object(schema, schema.get("$defs", {}))
    section.model_validate(made)
    return made


def _object(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    needed = schema.get("required", ())
    return {key: _value(schema["properties"][key], definitions) for key in needed}


def _value(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Any:
    """Return a value of a JSON schema's kind, as small as may be."""
    if schema.get("examples"):
        return schema["examples"][0]
    if "$ref" in schema:
        return _value(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return _value(schema[key][0], definitions)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "integer":
            low = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
            return min(low, schema.get("maximum", low))
        case "number":
            low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
            high = schema.get("maximum", schema.get("exclusiveMaximum", low + 1))
            return (low + high) / 2
        case "boolean":
            return False
        case "array":
            return [_value(schema.get("items", {}), definitions)] * schema.get("minItems", 1)
        case "object":
            made = _object(schema, definitions)
            if schema.get("minProperties", 0) > len(made):
                made["x"] = _value(schema.get("additionalProperties", {}), definitions)
            return made
        case "string":
            return "x" * max(1, schema.get("minLength", 1))
    return None


WRONG: tuple[Any, ...] = (None, True, -1, 0, 1.5, "", "no such thing", [], ["no such thing"], {})
"""Values that few fields take; those that a field does take are values like any other."""


def doubtful_sections(
    section: type[BaseModel], right: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield sections that differ from a right one in one key, each with what is odd about it."""
    for key in section.model_fields:
        for value in WRONG:
            if right.get(key, section) != value:
                yield f"{key}: {value!r}", {**right, key: value}


def wrong_sections(right: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what no section may be, each with what is wrong about it."""
    yield "the unknown key 'no_such_key'", {**right, "no_such_key": 1}
    for value in ("no such thing", 1.5, ["no such thing"]):
        yield f"{value!r} in the place of the section", value
