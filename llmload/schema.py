"""The JSON schema of a spec, for editors: the core keys and every plugin's section in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .spec import LoadSpec

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


def json_schema(sections: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """Return the draft 2020-12 schema of a spec whose plugins are ``sections``.

    Definitions that sections share are there once; those of equal name are told apart by pydantic.

    :param sections: spec key -> pydantic model of the plugin that owns it.
    """
    models: list[type[BaseModel]] = [LoadSpec, *sections.values()]
    references, document = models_json_schema([(model, "validation") for model in models])
    definitions: dict[str, Any] = document["$defs"]
    core = definitions.pop(references[LoadSpec, "validation"]["$ref"].rpartition("/")[2])
    properties = dict(core["properties"])
    for key, model in sections.items():
        properties[key] = references[model, "validation"]
    return {
        "$schema": DIALECT,
        "title": "llmload spec",
        "description": core["description"].partition("\n\n")[0],
        "type": "object",
        "properties": properties,
        "required": core["required"],
        "additionalProperties": False,
        "$defs": definitions,
    }
