"""Regular expressions that somebody else wrote, matched within a budget of time.

Python's own matcher tries for ever where repetitions nest (``(a+)+$`` on thirty letters), holds the
interpreter's lock meanwhile, and cannot be told to stop. The `regex` package has the same language
and can. Only what is over the budget for one short text counts, so that no number of ordinary
matches is ever too much, and many that are nearly too slow are.
"""

from __future__ import annotations

import re
import time
from functools import lru_cache
from typing import Any, Final

from llmload.errors import RequestError

SECONDS: Final = 1.0
"""Processor time that one expression may take beyond what an ordinary one takes."""
_ORDINARY: Final = 1e-4
"""Seconds that a match of an ordinary expression takes at the very most."""
_SHOWN: Final = 60

# What compiling a pattern raises: bad syntax, a repetition too large, groups in groups in groups.
FAULTS: Final = (re.error, OverflowError, RecursionError)


def search(pattern: str, text: str) -> Any:
    """Return what ``re.search`` does.

    :raises RequestError: the expression takes too long.
    """
    return _budgeted(pattern).run("search", text)


def match(pattern: str, text: str) -> Any:
    """Return what ``re.match`` does; raises as :func:`search`."""
    return _budgeted(pattern).run("match", text)


def fullmatch(pattern: str, text: str) -> Any:
    """Return what ``re.fullmatch`` does; raises as :func:`search`."""
    return _budgeted(pattern).run("fullmatch", text)


def sub(pattern: str, replacement: str, text: str) -> str:
    """Return what ``re.sub`` does; raises as :func:`search`."""
    replaced: str = _budgeted(pattern).run("sub", replacement, text)
    return replaced


class _Budgeted:
    """One expression, and how much of its budget is spent."""

    def __init__(self, pattern: str) -> None:
        import regex

        self._pattern = pattern
        self._compiled = regex.compile(pattern)
        self._left = SECONDS

    def run(self, method: str, *texts: str) -> Any:
        began = time.thread_time()
        result: Any = None
        try:
            result = getattr(self._compiled, method)(*texts, timeout=self._left + _ORDINARY)
        except TimeoutError:
            self._left = 0
        self._left -= max(0, time.thread_time() - began - _ORDINARY)
        if self._left > 0:
            return result
        self._left = SECONDS  # for the next request
        raise RequestError(
            f"the regular expression {self._pattern[:_SHOWN]!r} takes too long on"
            f" {texts[-1][:_SHOWN]!r}",
            fix="Write it without repetitions inside repetitions, such as `(a+)+`.",
        )


@lru_cache(maxsize=4096)
def _budgeted(pattern: str) -> _Budgeted:
    return _Budgeted(pattern)
