"""Several models as one spec: members by name, each a spec of its own or another one's adapter.

``like`` is resolved here, when a group is read: what comes out names no other member but where one
member's model is another's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pydantic import ModelWrapValidatorHandler, SkipValidation, ValidationError, model_validator

from llmload.errors import LlmloadError, Problem, SpecError
from llmload.spec import loadspec
from llmload.spec.loadspec import LoadSpec, Section
from llmload.spec.refusals import TOP_LEVEL, explain
from llmload.spec.suggest import nearest
from llmload.spec.yaml_read import dotted

if TYPE_CHECKING:
    from pydantic import BaseModel

    from llmload.spec.document import Document

MODELS: Final = "models"
"""The top-level key by which a group is told from a single spec."""
LIKE: Final = "like"
ADAPTER_OF: Final = "adapter_of"
NAME: Final = r"[A-Za-z_][\w-]*"
"""What a member can be called."""

Check: TypeAlias = Callable[[Mapping[str, Any]], LoadSpec]
"""Makes a member's keys a spec, or raises ``SpecError`` with all their faults."""


class AdapterSpec(Section):
    """A member that has no model of its own: another member's, with its adapter off or frozen."""

    adapter_of: str
    """The member whose model it is, which must have an adapter of PEFT."""
    frozen_copy: bool = False
    """``false``: the model with its adapter off, at no memory. ``true``: the model with a second
    adapter, named as this member, that holds what the first held when it was loaded."""


Member: TypeAlias = LoadSpec | AdapterSpec


class GroupSpec(Section):
    """Models that are loaded together, by name.

    A member is a spec of its own; ``like: OTHER`` and the keys in which it differs from the other;
    or ``adapter_of: OTHER``. The constructor resolves ``like`` and checks the core keys; sections
    are kept as given until a registry, which knows the plugins, validates the whole.

    :raises SpecError: with every fault at once.
    """

    models: Mapping[str, SkipValidation[LoadSpec | AdapterSpec]]
    """Members by name, in the order in which they are loaded."""

    @model_validator(mode="wrap")
    @classmethod
    def _in_our_words(cls, data: Any, handler: ModelWrapValidatorHandler[GroupSpec]) -> GroupSpec:
        if isinstance(data, GroupSpec):
            return handler(data)
        made = _members(data, lambda keys: LoadSpec(**keys), lambda key: True)
        return handler({MODELS: made})

    def own_models(self) -> dict[str, LoadSpec]:
        """Return the members that have a model of their own."""
        return {name: m for name, m in self.models.items() if isinstance(m, LoadSpec)}


def is_group(data: Mapping[str, Any]) -> bool:
    """Say whether plain data is a group of models rather than the spec of one."""
    return MODELS in data


def validate(
    document: Document,
    sections: Mapping[str, type[BaseModel]],
    *,
    key_rules: Iterable[str] | None = None,
) -> GroupSpec:
    """Return the group of ``document``, with each section as an instance of its plugin's model.

    :param sections: spec key -> model of the plugin that owns it.
    :param key_rules: what the key of that name can hold; None: whatever stands there.
    :raises SpecError: with every fault at once, in the file's order.
    """

    def check(keys: Mapping[str, Any]) -> LoadSpec:
        return loadspec.check(keys, sections, beside=(LIKE, ADAPTER_OF), key_rules=key_rules)

    try:
        made = _members(document.data, check, {*LoadSpec.model_fields, *sections}.__contains__)
        return GroupSpec(models=made)
    except SpecError as error:
        raise SpecError(document.placed(error.problems)) from None


def in_member(name: str, problem: Problem) -> Problem:
    """Return a problem of one member's load as one of the group's."""
    where, message = dotted((MODELS, name)), problem.message
    if problem.where:
        where += problem.where if problem.where.startswith("[") else f".{problem.where}"
    elif problem.plugin:
        message = f"plugin {problem.plugin!r}: {message}"
    fix = problem.fix.replace(TOP_LEVEL, f"`{dotted((MODELS, name))}`")
    return problem.model_copy(update={"where": where, "message": message, "fix": fix})


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Give the errors of one member's load, of whatever kind, the member's name."""
    try:
        yield
    except LlmloadError as error:
        error.problems = tuple(in_member(name, problem) for problem in error.problems)
        raise


def _members(
    data: Mapping[str, Any], check: Check, is_known: Callable[[str], bool]
) -> dict[str, Member]:
    """Resolve and check all members.

    :param is_known: whether a key can stand in a spec; a misspelt one is refused with null too.
    :raises SpecError: with every fault at once.
    """
    problems = [_beside(key) for key in data if key != MODELS]
    given = data.get(MODELS)
    if not isinstance(given, Mapping) or not given:
        problem = Problem(
            where=MODELS,
            message=f"expected a mapping of names to models, found {_kind(given)}",
            fix="Write at least `models: {policy: {model: ...}}`.",
        )
        raise SpecError([*problems, problem])
    members: dict[str, Member] = {}
    for name, keys in given.items():
        try:
            members[name] = _member(name, given, check, is_known)
        except SpecError as error:
            problems += [in_member(name, p) for p in error.problems if _is_own(p, keys)]
    if problems:
        raise SpecError(problems)
    return members


def _member(
    name: str, given: Mapping[str, Any], check: Check, is_known: Callable[[str], bool]
) -> Member:
    keys = given[name]
    if not re.fullmatch(NAME, name):
        raise _fault("", f"{name!r} cannot be a name", "Use letters, digits, `_` and `-`.")
    if isinstance(keys, LoadSpec | AdapterSpec):
        return keys
    if not isinstance(keys, Mapping):
        raise _fault("", f"expected a mapping, found {_kind(keys)}", "Write `{model: ...}`.")
    if ADAPTER_OF in keys:
        return _adapter(name, keys, given)
    ancestry = _ancestry(name, given)
    merged: dict[str, Any] = {}
    for ancestor in reversed(ancestry):
        for key, value in _keys_of(given[ancestor]).items():
            if value is None and len(ancestry) > 1 and (key in merged or is_known(key)):
                merged.pop(key, None)
            elif key != LIKE:
                merged[key] = value
    return check(merged)


def _adapter(name: str, keys: Mapping[str, Any], given: Mapping[str, Any]) -> AdapterSpec:
    fields = AdapterSpec.model_fields
    problems = [
        Problem(
            where=key,
            message="a member with `adapter_of` has no model of its own, and takes no such key",
            fix=nearest(key, fields) or "Remove it: the other member's holds.",
        )
        for key in keys
        if key not in fields
    ]
    own = {key: value for key, value in keys.items() if key in fields}
    try:
        made = AdapterSpec.model_validate(own)
    except ValidationError as error:
        problems += explain(error, AdapterSpec, own)
    else:
        try:
            _hold_to_members(name, ADAPTER_OF, made.adapter_of, given)
        except SpecError as error:
            problems += error.problems
    if problems:
        raise SpecError(problems)
    return made


def _ancestry(name: str, given: Mapping[str, Any]) -> list[str]:
    """Return a member's name, that of the member it is like, and so on.

    :raises SpecError: a name is wrong or the names lead in a circle; without a problem where it is
        another member's fault.
    """
    chain = [name]
    while LIKE in (keys := _keys_of(given[chain[-1]])):
        other = keys[LIKE]
        try:
            _hold_to_members(chain[-1], LIKE, other, given)
        except SpecError as error:
            raise SpecError(error.problems if len(chain) == 1 else ()) from None
        if other in chain:
            circle = " is like ".join(repr(link) for link in [*chain, other])
            problem = Problem(
                where=LIKE,
                message=f"the members lead in a circle: {circle}",
                fix="Give one of them a `model`.",
            )
            raise SpecError([problem] if other == name else ())
        chain.append(other)
    return chain


def _hold_to_members(name: str, key: str, other: object, given: Mapping[str, Any]) -> None:
    """Refuse ``other`` unless it is a second member that has a model of its own."""
    if other == name:
        raise _fault(key, f"a member cannot be `{key}` itself", "Name another member.")
    if not isinstance(other, str) or other not in given:
        others = [member for member in given if member != name]
        near = nearest(other, others) if isinstance(other, str) else ""
        raise _fault(
            key,
            f"no member is called {other!r}",
            near or (f"Others are: {', '.join(others)}." if others else "There is no other."),
        )
    keys = _keys_of(given[other])
    if ADAPTER_OF in keys:
        raise _fault(
            key,
            f"{other!r} has no model of its own",
            f"Name the member whose adapter it is: {keys[ADAPTER_OF]!r}.",
        )


def _keys_of(member: object) -> Mapping[str, Any]:
    """Return what a member sets, however it was given; nothing of what is no mapping."""
    if isinstance(member, LoadSpec | AdapterSpec):
        core = {key: getattr(member, key) for key in member.model_fields_set}
        return core | dict(member.model_extra or {})
    return member if isinstance(member, Mapping) else {}


def _is_own(problem: Problem, keys: Any) -> bool:
    """Say whether a fault is the member's own, or that of the member it is like."""
    first = re.match(r"[\w-]*", problem.where)
    assert first  # matches anything
    return not (isinstance(keys, Mapping) and LIKE in keys) or first[0] in ("", *keys)


def _beside(key: str) -> Problem:
    return Problem(
        where=key,
        message="a group has no key beside `models`",
        fix="Move it into the members that need it.",
    )


def _fault(where: str, message: str, fix: str) -> SpecError:
    return SpecError(message, fix=fix, where=where)


def _kind(value: object) -> str:
    if value is None:
        return "nothing (null)"
    kinds = {"dict": "an empty mapping", "list": "a list", "tuple": "a list"}
    return kinds.get(type(value).__name__, repr(value))
