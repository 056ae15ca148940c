"""What a key of a spec means, from the models that check it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from llmload.errors import RequestError
from llmload.spec.schema import Key, json_schema, keys
from llmload.spec.suggest import nearest

if TYPE_CHECKING:
    from llmload.host.registry import Registry


class Explanation(BaseModel):
    """One key of a spec, or the spec itself."""

    key: str
    """Dotted, as it is written; empty for the whole spec."""
    plugin: str = ""
    """Plugin and distribution that own it; empty for what belongs to the core."""
    takes: str = ""
    """Its values in words."""
    default: str = ""
    """As YAML; ``required`` where there is none."""
    meaning: str
    """What it does."""
    examples: list[Any] = []
    """Values that can be written."""
    needs: list[str] = []
    """What has to be installed for it."""
    conflicts: list[str] = []
    """What it cannot be combined with, and why."""
    keys: list[Key] = []
    """The keys in it."""


def explain(path: str, registry: Registry) -> Explanation:
    """Describe the key at a dotted path, or with an empty one all keys of a spec.

    :raises RequestError: there is no such key.
    """
    document = json_schema(registry.sections, registry.key_rules)
    definitions: dict[str, Any] = document["$defs"]
    parts = path.split(".") if path else []
    schema, name = document, ""
    found = Explanation(key=path, meaning=document["description"], keys=keys(document))
    for part in parts:
        known = {key.name: key for key in keys(schema)}
        if part not in known:
            raise _unknown(part, name, known)
        field = schema["properties"][part]
        schema = _object(field, definitions)
        name = f"{name}.{part}" if name else part
        key = known[part]
        found = Explanation(
            key=path,
            takes=key.takes,
            default=key.default,
            meaning=schema.get("description") or key.meaning,
            examples=field.get("examples", []),
            keys=keys(schema),
        )
    if parts and (owner := _owner(parts[0], registry)) is not None:
        found.plugin = f"{owner.name}, {owner.distribution}"
        if len(parts) == 1:
            found.needs = list(getattr(owner.plugin, "requires", ()))
            found.conflicts = [
                f"{conflict.key or conflict.ability}: {conflict.reason}"
                for conflict in getattr(owner.plugin, "conflicts", ())
            ]
    return found


def _owner(key: str, registry: Registry) -> Any:
    return next(
        (info for info in registry.plugins if info.name == key and info.status == "active"), None
    )


def _object(field: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of the mapping that a key holds, or may hold; else an empty one."""
    for choice in (field, *field.get("anyOf", ())):
        if "$ref" in choice:
            found: dict[str, Any] = definitions[choice["$ref"].rpartition("/")[2]]
            return found
    return {}


def _unknown(part: str, of: str, known: dict[str, Key]) -> RequestError:
    if not known:
        return RequestError(
            f"`{of}` has no keys in it, and {part!r} was asked for",
            fix=f"Ask for `llmload explain {of}`.",
        )
    where = f"`{of}` has" if of else "a spec has"
    meant = nearest(part, known) or f"Known are: {', '.join(known)}."
    return RequestError(f"{where} no key {part!r}", fix=meant)
