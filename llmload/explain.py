"""pydantic's errors in our words: what was asked, what was found, what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, TypeAlias, get_args

from pydantic import BaseModel

from . import spellings
from .errors import Problem
from .suggest import nearest

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

Path: TypeAlias = tuple[str | int, ...]
"""Keys and list indices that lead to a value of the spec."""


class InvalidValue(ValueError):
    """Raised by a validator of a section: what is wrong with a value, and the way out.

    :param message: one sentence without a final full stop.
    :param fix: what to do next, in one sentence.
    """

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.fix = fix


# pydantic's error type -> what was expected, for errors that mean "another kind of value".
_KINDS: Final = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dataclass_type": "a mapping",
    "dict_type": "a mapping",
    "float_parsing": "a number",
    "float_type": "a number",
    "frozen_set_type": "a list",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "mapping_type": "a mapping",
    "model_attributes_type": "a mapping",
    "model_type": "a mapping",
    "none_required": "null",
    "path_type": "a path",
    "set_type": "a list",
    "string_type": "text",
    "tuple_type": "a list",
}
_CHOICES: Final = ("literal_error", "enum")
# pydantic's error type -> what must hold, filled in from the error's context.
_RULES: Final = {
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
    "multiple_of": "must be a multiple of {multiple_of}",
    "string_pattern_mismatch": "must match the regular expression {pattern}",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must have at least {min_length} characters",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must have at least {min_length} entries",
}
_SECRET_KEY: Final = re.compile(
    r"^token$|(auth|hf|hub|access|api|bearer|wandb)_?token|passw(or)?d|secret|credential"
    r"|(api|access|private|wandb|swanlab)_?key",
    re.IGNORECASE,
)
_SECRET_VALUE: Final = re.compile(r"\bhf_[A-Za-z0-9]{8,}|://[^/\s]*@")
_SHOWN: Final = 60
"""Characters of a value that a message shows."""


def explain(
    error: ValidationError, model: type[BaseModel], data: object, *, within: Path = ()
) -> list[Problem]:
    """Return one problem per faulty value, in pydantic's order.

    :param model: the model that refused ``data``.
    :param within: where ``data`` stands in the whole spec; goes before each path.
    """
    faults = [(_path_in(data, details), details) for details in error.errors(include_url=False)]
    by_path: dict[Path, list[ErrorDetails]] = {}
    for path, details in faults:
        by_path.setdefault(path, []).append(details)
    return [
        _problem(path, details, model, data, within)
        for path, details in by_path.items()
        if not _is_other_branch(path, details, by_path)
    ]


def unknown_key(
    path: Path, value: object, model: type[BaseModel], sections: Mapping[str, type[BaseModel]]
) -> Problem:
    """Return the problem of a key that nothing knows, with the key that was meant.

    :param path: where the key stands; its last part is the key.
    :param model: what is allowed at that place, together with ``sections``.
    """
    where, key = dotted(path), str(path[-1])
    foreign = spellings.SPELLINGS.get(where)
    if foreign is not None:
        return Problem(
            where=where,
            message=f"unknown key, known from {foreign.tools}",
            fix=foreign.fix("..." if _is_secret(path, value) else value),
        )
    names = [*_fields(model), *sections]
    owners = [name for name, section in sections.items() if key in _fields(section)]
    fix = nearest(key, names)
    if owners:
        fix = f"Move it into the section {' or '.join(map(repr, owners))}."
    return Problem(
        where=where, message="unknown key", fix=fix or f"Known keys are: {', '.join(names)}."
    )


def dotted(path: Path) -> str:
    """Return a path as one reads it: ``lora.target_modules[0]``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[\w-]+", part):
            text += f".{part}" if text else part
        else:
            text += f"[{part!r}]"
    return text


def show(value: object, path: Path = ()) -> str:
    """Describe a value in a message: scalars are quoted, long ones cut, secrets never shown."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "a list"
    if _is_secret(path, value):
        return "a value that is not shown"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...{text[-1]}"
