"""pydantic's errors in our words: what was asked, what was found, what to write instead."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Mapping, Sequence, Sized
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeAlias, get_args

from pydantic import BaseModel

from llmload.errors import Problem
from llmload.spec.foreign_keys import HIDDEN, SPELLINGS, VALUES, Spelling
from llmload.spec.suggest import nearest
from llmload.spec.yaml_read import Path, dotted
from llmload.spec.yaml_write import dump_inline

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

Places: TypeAlias = Mapping[str, Iterable[str]]
"""Section (empty: the top level) -> the keys that can stand in it."""


class InvalidValueError(ValueError):
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
    "finite_number": "must be a finite number, found {found}",
    "greater_than": "must be greater than {gt}, found {found}",
    "greater_than_equal": "must be {ge} or more, found {found}",
    "less_than": "must be less than {lt}, found {found}",
    "less_than_equal": "must be {le} or less, found {found}",
    "multiple_of": "must be a multiple of {multiple_of}, found {found}",
    "string_pattern_mismatch": "must match the regular expression {pattern}, found {found}",
    "string_too_long": "must have {max_length} or fewer characters, found {found}",
    "string_too_short": "must have {min_length} or more characters, found {found}",
    "too_long": "must have {max_length} or fewer entries, found {actual_length}",
    "too_short": "must have {min_length} or more entries, found {actual_length}",
}
_SECRET_KEY: Final = re.compile(
    r"^token$|(auth|hf|hub|access|api|bearer|wandb)_?token|passw(or)?d|secret|credential"
    r"|(api|access|private|wandb|swanlab)_?key",
    re.IGNORECASE,
)
_SECRET_VALUE: Final = re.compile(r"\bhf_[A-Za-z0-9]{8,}|://[^/\s]*@")
_SWITCHES: Final = {"yes": True, "on": True, "no": False, "off": False}
_CONSTANTS: Final = {"True": "true", "False": "false", "None": "null"}
_QUOTED: Final = {
    "true or false": re.compile("true|false"),
    "a whole number": re.compile(r"[-+]?\d+"),
    "a number": re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?"),
}
"""Kind of value -> what it looks like inside quotes."""
_KNOWN: Final = "Known keys are: "
_BITS: Final = re.compile(r"(?:torch\.)?(?:u?int|float|fp|nf)?([48])(?:bits?|_?e\dm\d\w*)?")
"""What is written for a dtype by who wants weights of 4 or 8 bits."""
_SHOWN: Final = 60
"""Characters of a value that a message shows."""
SHOWN: Final = 50
"""Faults of one kind that are told one by one."""
TOP_LEVEL: Final = "the top level"
"""What a message calls the place of core keys and sections."""


def explain(
    error: ValidationError,
    model: type[BaseModel],
    data: object,
    *,
    within: Path = (),
    places: Places = MappingProxyType({}),
    spellings: Mapping[str, Spelling] = SPELLINGS,
) -> list[Problem]:
    """Return one problem per faulty value, in pydantic's order.

    :param model: the model that refused ``data``.
    :param within: where ``data`` stands in the whole spec; goes before each path.
    :param places: the keys of the whole spec, for keys that stand in the wrong place.
    :param spellings: what other tools call the keys of the whole spec.
    """
    by_path: dict[Path, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False)[: 4 * SHOWN]:
        by_path.setdefault(_path_in(data, details), []).append(details)
    problems: list[Problem] = []
    for path, faults in by_path.items():
        if len(problems) == SHOWN:
            problems.append(more_faults((*within, *path), error.error_count() - SHOWN))
            break
        # A union is refused by each of its branches. Where one of them got further, it is the one
        # that was meant, and what the others say of the whole value does not matter.
        deeper = any(len(other) > len(path) and other[: len(path)] == path for other in by_path)
        if deeper and all(fault["type"] in (*_KINDS, *_CHOICES) for fault in faults):
            continue
        where = (*within, *path)
        value = _value_at(data, path)
        fields = _fields_at(model, path[:-1])
        if faults[0]["type"] == "extra_forbidden":
            problems.append(unknown_key(where, value, fields, places, spellings))
        elif faults[0]["type"] == "missing":
            problems.append(_missing(where, fields.get(str(path[-1]))))
        else:
            problems.append(_wrong_value(where, value, faults))
    return problems


def unknown_key(
    path: Path,
    value: object,
    known: Iterable[str],
    places: Places,
    spellings: Mapping[str, Spelling] = SPELLINGS,
) -> Problem:
    """Return the problem of a key that nothing knows there, with the key that was meant.

    :param path: where the key stands; its last part is the key.
    :param known: the keys that can stand there.
    """
    key = str(path[-1])
    homes = [place or TOP_LEVEL for place, keys in places.items() if key in keys]
    foreign = spellings.get(dotted(path)) or spellings.get(key)
    if foreign is not None:
        fix = foreign.fix(HIDDEN if is_secret(path, value) else value)
        return _problem(path, f"unknown key, known from {foreign.tools}", fix)
    if homes:
        return _problem(path, "unknown key", f"Move it to {' or '.join(homes)}.")
    name, colon, rest = key.partition(":")
    if colon and rest and value is None and name in known:  # as in {r:8}
        return _problem(path, "unknown key", f"Write a space after the colon: `{name}: {rest}`.")
    fix = nearest(key, known) or f"{_KNOWN}{', '.join(known)}."
    return _problem(path, "unknown key", fix)


def lists_once(problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems, with each list of known keys at the first that has it."""
    listed: set[str] = set()
    found = []
    for problem in problems:
        fix = problem.fix
        if fix in listed:
            problem = problem.model_copy(update={"fix": "It is none of those listed above."})
        elif fix.startswith(_KNOWN):
            listed.add(fix)
        found.append(problem)
    return found


def more_faults(path: Path, count: int) -> Problem:
    """Return the problem that there are ``count`` more faults, of which ``path`` is the first."""
    return _problem(path, f"this and {count - 1:,} more are wrong too", "Mend the others first.")


def unknown_words(key: str, value: object, known: Sequence[str]) -> list[Problem]:
    """Return the problem of each word in a list that is none of those that are ``known``."""
    words = value if isinstance(value, list | tuple) else ()
    kinds = [repr(word) for word in known]
    asked = " or ".join(filter(None, [", ".join(kinds[:-1]), *kinds[-1:]]))
    return [
        _problem((key, at), f"expected {asked}, found {_show(word)}", meant(word, known))
        for at, word in enumerate(words)
        if isinstance(word, str) and word not in known
    ][:SHOWN]


def meant(word: str, choices: Collection[str]) -> str:
    """Return which of ``choices`` another tool's ``word`` is, or looks like, as a fix."""
    ours = VALUES.get(word.lower())
    return f"Write {ours}." if ours in choices else nearest(word, choices)


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return a model's fields by the name they have in a spec."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _problem(path: Path, message: str, fix: str) -> Problem:
    """Return a problem of the value at ``path``, cleared of what looks like a secret."""
    message, fix = (_SECRET_VALUE.sub("...", text) for text in (message, fix))
    return Problem(where=dotted(path), message=message, fix=fix)


def _show(value: object, path: Path = ()) -> str:
    """Describe a value in a message: long text is cut, a secret is never shown."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if is_secret(path, value):
        return "a value that is not shown"
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...{text[-1]}"


def is_secret(path: Path, value: object) -> bool:
    """Say whether a value is not to be shown, for the name of its key or what it looks like."""
    named_so = any(isinstance(part, str) and _SECRET_KEY.search(part) for part in path)
    return named_so or (isinstance(value, str) and _SECRET_VALUE.search(value) is not None)


def _path_in(data: object, details: ErrorDetails) -> Path:
    """Return where an error is in the data: pydantic's location without the names of branches."""
    path: list[str | int] = []
    for part in details["loc"]:
        try:
            data = data[part]  # type: ignore[index]
        except (LookupError, TypeError):
            continue
        path.append(part)
    if details["type"] == "missing":
        path.append(details["loc"][-1])
    return tuple(path)


def _value_at(data: Any, path: Path) -> Any:
    for part in path:
        try:
            data = data[part]
        except LookupError:
            return None
    return data


def _fields_at(model: type[BaseModel], path: Path) -> dict[str, FieldInfo]:
    """Return the fields that the values at ``path`` can have, whatever branch of a union it is."""
    models = [model]
    for part in path:
        inner = [fields_of(m)[part].annotation for m in models if part in fields_of(m)]
        # An entry of a list or mapping is of the model that its container already named.
        models = [m for annotation in inner for m in _models_in(annotation)] or models
    return {name: field for m in models for name, field in fields_of(m).items()}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _missing(path: Path, field: FieldInfo | None) -> Problem:
    example = (field.examples or ["..."])[0] if field else "..."
    return _problem(path, "the key is required", f"Add it, such as `{path[-1]}: {example}`.")


def _wrong_value(path: Path, value: object, faults: list[ErrorDetails]) -> Problem:
    # Where one branch of a union takes the kind of value, its rule is what was broken.
    broken = [fault for fault in faults if fault["type"] not in (*_KINDS, *_CHOICES)]
    if not broken:
        return _wrong_kind(path, value, faults)
    fault = broken[0]
    found = _show(value, path)
    cause = fault.get("ctx", {}).get("error")
    asked = fault["msg"].removeprefix("Input should be ")
    if cause is not None:
        message = str(cause)
    elif fault["type"] in _RULES:
        message = _RULES[fault["type"]].format(found=found, **_context(fault, value))
    elif asked != fault["msg"]:
        message = f"expected {asked}, found {found}"
    else:
        message = f"{asked[0].lower()}{asked[1:]}, found {found}"
    return _problem(path, message, getattr(cause, "fix", ""))


def _context(fault: ErrorDetails, value: object) -> dict[str, Any]:
    context = dict(fault.get("ctx", {}))
    if context.get("actual_length", ...) is None and isinstance(value, Sized):
        context["actual_length"] = len(value)  # pydantic does not count a mapping
    return context


def _wrong_kind(path: Path, value: object, faults: list[ErrorDetails]) -> Problem:
    kinds: list[str] = []
    for fault in faults:
        if fault["type"] in _CHOICES:
            choices = fault["ctx"]["expected"].replace(" or ", ", ").split(", ")
            kinds += [_CONSTANTS.get(choice, choice) for choice in choices]
        else:
            kinds.append(_KINDS[fault["type"]])
    kinds = list(dict.fromkeys(kinds))
    asked = " or ".join(filter(None, [", ".join(kinds[:-1]), kinds[-1]]))
    fix = "" if is_secret(path, value) else _fix_of_kind(path, value, kinds)
    return _problem(path, f"expected {asked}, found {_show(value, path)}", fix)


def _fix_of_kind(path: Path, value: object, kinds: list[str]) -> str:
    """Return what to write instead, where the value shows what was meant."""
    switch = _SWITCHES.get(value.lower()) if isinstance(value, str) else value
    if kinds == ["a mapping"] and len(path) == 1 and isinstance(switch, bool):
        return f"Write `{path[0]}: {{}}` for its defaults." if switch else "Remove the key."
    if kinds == ["a mapping"] and len(path) == 1 and value not in (None, "None"):
        return f"`llmload explain {path[0]}` shows what it takes."
    if value in (None, "None"):
        return "Remove the key, or give it a value."
    if isinstance(value, str):
        choices = [kind[1:-1] for kind in kinds if kind[0] == "'"]
        if isinstance(switch, bool) and "true or false" in kinds:
            return f"Write {str(switch).lower()}."
        if any(kind in kinds and pattern.fullmatch(value) for kind, pattern in _QUOTED.items()):
            return "Remove the quotes."
        bits = _BITS.fullmatch(value.lower())
        if bits is not None and path == ("dtype",):
            return f"Weights of {bits[1]} bits are `kbit: {{bits: {bits[1]}}}`."
        if choices:
            return meant(value, choices)
        if "a list" in kinds and len(value) <= _SHOWN:
            return f"Write {dump_inline([value])}."
    elif isinstance(value, float) and value.is_integer() and "a whole number" in kinds:
        return f"Write {int(value)}."
    elif isinstance(value, int | float) and "text" in kinds:
        return "Put it in quotes."
    return ""
