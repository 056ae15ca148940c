"""A spec as plain data, with the place of each key in its file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llmload.errors import Problem
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
        """Return the problems with file, line and column, in the order of the file."""
        if not self.file:
            return list(problems)
        placed = []
        for problem in problems:
            line, column = self.position(problem.where) or (1, 1)
            update = {"file": self.file, "line": line, "column": column}
            placed.append(problem.model_copy(update=update))
        return sorted(placed, key=lambda problem: (problem.line, problem.column))
