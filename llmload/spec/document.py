"""A spec as plain data, with the place of each key in its file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from llmload.errors import Problem, SpecError
from llmload.spec.yaml_read import Path, dotted


@dataclass(frozen=True, kw_only=True)
class Document:
    """A spec as plain data, before any key of it is checked."""

    data: Mapping[str, Any]
    """dict, list, str, int, float, bool and None, all keys text."""
    file: str = ""
    """The file it was read from; empty for a spec from Python."""
    positions: Mapping[Path, tuple[int, int]] = field(default_factory=dict, repr=False)
    """Line and column of each key and list entry, counted from 1."""
    said_by: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Dotted path of a value that is not from the file -> what said it, such as an option."""

    def with_value(self, path: Path, value: Any, said_by: str) -> Document:
        """Return the document with ``value`` at ``path``, whatever stood there before.

        Mappings on the way that are missing, or null, are made.

        :param said_by: for messages, what the value is from: ``--set lora.r=8``.
        :raises SpecError: something on the way is no mapping.
        """
        data = _with_value(self.data, path, value, said_by)
        return replace(self, data=data, said_by={**self.said_by, dotted(path): said_by})

    def position(self, where: str) -> tuple[int, int] | None:
        """Return line and column of a dotted path, or of the nearest key that contains it.

        None for a spec that is not from a file.
        """
        while where not in self._by_name and where:
            where = where[: max(where.rfind("."), where.rfind("["), 0)]
        return self._by_name.get(where, (1, 1) if self.file else None)

    @cached_property
    def _by_name(self) -> dict[str, tuple[int, int]]:
        return {dotted(path): position for path, position in self.positions.items()}

    def placed(self, problems: Iterable[Problem]) -> list[Problem]:
        """Return the problems with file, line and column, in the order of the file.

        What is wrong with a value that is not from the file has the words that said it, and comes
        first.
        """
        placed = []
        for problem in problems:
            said_by = self._said_by(problem.where)
            update: dict[str, Any] = {"file": said_by}
            if not said_by and self.file:
                line, column = self.position(problem.where) or (1, 1)
                update = {"file": self.file, "line": line, "column": column}
            placed.append(problem.model_copy(update=update))
        return sorted(placed, key=lambda problem: (problem.line or 0, problem.column or 0))

    def _said_by(self, where: str) -> str:
        """What said the value at a dotted path, or the innermost that holds it; else nothing."""
        for path in reversed(list(self.said_by)):
            if where == path or where.startswith((f"{path}.", f"{path}[")):
                return self.said_by[path]
        return ""


def _with_value(data: Any, path: Path, value: Any, said_by: str) -> Any:
    if not path:
        return value
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        message = f"there is no key {path[0]!r} in {data!r}, which is no mapping"
        fix = "Set the whole value, written as YAML: `--set 'lora={r: 8}'`."
        raise SpecError(message, fix=fix, file=said_by)
    inner = _with_value(data.get(path[0]), path[1:], value, said_by)
    return {**data, path[0]: inner}
