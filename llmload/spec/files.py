"""Reads a spec, or a group of them, from YAML, JSON or Python."""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, Final, TypeAlias

from pydantic import BaseModel

from llmload.errors import Problem, SpecError
from llmload.spec import other_files, yaml_read
from llmload.spec.document import Document
from llmload.spec.groupspec import GroupSpec
from llmload.spec.loadspec import LoadSpec
from llmload.spec.values import dtype_name
from llmload.spec.yaml_read import Path, dotted

MAX_BYTES: Final = 256 * 1024
"""Size of the largest spec file that is read."""
_PIPES: Final = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
"""Where a shell puts what a command writes: pipes that are read like files."""
_LONGEST_INT: Final = 332
"""Bits of a whole number from Python: those of 100 digits, as in a file."""

SpecLike: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | LoadSpec | GroupSpec | Document
"""What ``llmload.load`` and ``load_group`` take: a file name, or the spec itself."""


def read(source: SpecLike) -> Document:
    """Return a spec as plain data; keys and types are checked by ``spec.validate``.

    :raises SpecError: the file cannot be read, is not YAML or JSON, or the data is not plain.
    """
    if isinstance(source, Document):
        return source
    if isinstance(source, LoadSpec | GroupSpec | Mapping):
        return Document(data=_plain_mapping(source))
    name: Any = source  # not everybody asks a type checker
    if not isinstance(name, str | os.PathLike):
        kind = type(name).__name__
        raise SpecError(
            f"a spec is a mapping or the name of a file, found an object of type {kind}",
            fix='Give at least `{"model": ...}`.',
        )
    return parse(_content(os.fspath(name)), os.fspath(name))


def parse(text: str | bytes, file: str = "<text>") -> Document:
    """Return the spec that ``text`` holds as YAML or JSON; bytes are UTF-8.

    :param file: name for messages; with the ending ``.json`` tabs are allowed between tokens.
    :raises SpecError: as :func:`read`.
    """
    if isinstance(text, bytes):
        text = _decoded(text, file)
    data, positions = yaml_read.parse(text, file)
    if not isinstance(data, dict):
        kind = "a list" if isinstance(data, list) else "a single value"
        raise SpecError(
            Problem(
                message=f"a spec is a mapping of keys to values, found {kind}",
                fix="Write at least `model: ...`.",
                file=file,
                line=1,
                column=1,
            )
        )
    return Document(data=data, file=file, positions=positions)


def _content(name: str) -> bytes:
    """Return the bytes of a spec file, or one more than ``MAX_BYTES`` where there are more."""
    path = FilePath(name)
    try:
        return _read(path.expanduser())
    except FileNotFoundError:
        raise SpecError(
            "the spec file does not exist",
            fix=other_files.instead_of(name) or "Check the name.",
            file=name,
        ) from None
    except IsADirectoryError:
        raise SpecError(
            "this is a folder, not a spec file",
            fix="Write a spec with `model:` set to the folder, and give the spec's name.",
            file=str(path),
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecError(
            f"the spec file cannot be read: {reason}", fix="Check the name.", file=str(path)
        ) from None


def _read(path: FilePath) -> bytes:
    # A fifo that nobody writes to would be waited for, and a terminal for what is typed there.
    flags = 0 if str(path).startswith(_PIPES) else getattr(os, "O_NONBLOCK", 0)
    with open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as handle:
        if flags and (handle.isatty() or stat.S_ISFIFO(os.fstat(handle.fileno()).st_mode)):
            raise ValueError("it is a terminal or a pipe, not a file")
        return handle.read(MAX_BYTES + 1)


def _decoded(content: bytes, file: str) -> str:
    if file.endswith(other_files.WEIGHTS):
        raise SpecError(
            "this is a file of weights, not a spec",
            fix=f"Give the folder it is in, {os.fspath(FilePath(file).parent)!r}.",
            file=file,
        )
    if len(content) > MAX_BYTES:
        raise SpecError(
            f"the spec file is larger than {MAX_BYTES // 1024} KiB",
            fix="Check that it is a spec; give a spec of that size from Python.",
            file=file,
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(
            f"the spec file is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}",
            fix="Save it as UTF-8.",
            file=file,
        ) from None


def _plain_mapping(source: LoadSpec | GroupSpec | Mapping[str, Any]) -> dict[str, Any]:
    """Return a spec from Python as the data that its file would hold."""
    problems: list[Problem] = []
    data = _plain(dict(source) if isinstance(source, GroupSpec) else source, (), problems)
    if problems:
        raise SpecError(problems)
    return data  # type: ignore[no-any-return]


def _plain(value: object, path: Path, problems: list[Problem]) -> Any:
    """Return ``value`` as dict, list and scalars; what cannot be is added to ``problems``."""
    if len(path) > yaml_read.MAX_DEPTH:
        raise SpecError(
            f"the spec is nested deeper than {yaml_read.MAX_DEPTH} levels",
            fix="Flatten it; a list or mapping must not contain itself.",
            where=dotted(path[:3]),
        )
    if isinstance(value, LoadSpec):
        core = value.model_dump(mode="json", exclude_unset=True, include=set(LoadSpec.model_fields))
        value = {**core, **value.sections}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True, by_alias=True)
    if isinstance(value, Mapping):
        plain = {}
        for key, item in value.items():
            if isinstance(key, str):
                plain[key] = _plain(item, (*path, key), problems)
            else:
                problems.append(
                    Problem(
                        where=dotted(path),
                        message=f"a key must be text, found {key!r}",
                        fix=f"Write {str(key)!r}.",
                    )
                )
        return plain
    if isinstance(value, list | tuple):
        return [_plain(item, (*path, index), problems) for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, str) and not re.search("[\ud800-\udfff]", value):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if value is None or (isinstance(value, int) and value.bit_length() <= _LONGEST_INT):
        return value
    problems.append(_not_plain(value, path))
    return None


def _not_plain(value: Any, path: Path) -> Problem:
    if isinstance(value, float):
        message, fix = f"{value} is not a finite number", "Write a number."
    elif isinstance(value, int):
        message = f"a whole number of {value.bit_length()} bits is more than anything here takes"
        fix = "Write a smaller one."
    elif isinstance(value, str):
        message, fix = (
            "the text has half of a surrogate pair, which is no character",
            "Write the whole pair, or the character itself.",
        )
    else:
        kind = type(value)
        message = f"a spec is plain data, found an object of type {kind.__module__}.{kind.__name__}"
        fix = (
            f"Write {dtype_name(value)!r}."
            if kind.__module__ == "torch"
            else "Write text, a number, true, false, null, a list or a mapping."
        )
    return Problem(where=dotted(path), message=message, fix=fix)
