"""Did you mean ...?"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

_LONGEST: Final = 100
"""Characters of a word that anybody misspells; comparing takes the square of it."""
_MANY: Final = 1000
"""Words that are all compared; of more, those of like length that begin alike."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``Did you mean 'x'?`` for the known word most like ``word``, or an empty string."""
    matches = closest(word, known)
    return f"Did you mean {matches[0]!r}?" if matches else ""


def closest(word: str, known: Iterable[str], count: int = 1) -> list[str]:
    """Return the known words most like ``word``, at most ``count``, the likest first.

    Among a million words those are compared that a slip of the pen could have made of ``word``.
    """
    if len(word) > _LONGEST:
        return []
    words = [other for other in known if len(other) <= _LONGEST]
    if len(words) > _MANY:
        words = [w for w in words if w[:2] == word[:2] and abs(len(w) - len(word)) <= 2][:_MANY]
    return difflib.get_close_matches(word, words, n=count, cutoff=0.6)
