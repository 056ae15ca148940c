"""Numbers and names as people read them, in plans, reports and what plugins show of theirs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable


def size_text(count: int) -> str:
    """Return bytes in the largest binary unit that leaves at least one before the point."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def pattern(name: str) -> str:
    """Return the dotted name of a tensor or module with ``*`` for each number in it."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def alike(names: Iterable[str]) -> list[str]:
    """Return names that differ in their numbers once, with how many there are."""
    counts = Counter(map(pattern, names))
    return [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]
