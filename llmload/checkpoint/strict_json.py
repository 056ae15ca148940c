"""JSON of files that nobody vouches for, read no wider than two readers would agree on.

Python's reader accepts more than RFC 8259 (``NaN``, repeated keys, lone surrogates, ``-0`` as an
integer), and has no limit but memory. Two readers that disagree about one file are how it shows
different weights to different programs, so everything doubtful is refused; and so is what is made
to exhaust whoever copies or walks through it.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

_MAX_DIGITS = 20  # 2**64 - 1 has twenty
MAX_DEPTH = 32
# transformers writes 10**30 for "no limit", with 31 digits; floats with at most 26.
_LONGEST_NUMBER = 40
_SURROGATE = re.compile("[\ud800-\udfff]")


def loads(data: bytes) -> Any:
    """Parse a header or an index: numbers are natural and below 2**64.

    :raises ValueError: with the reason, where any reader could object.
    """
    try:
        return _parse(data, parse_int=_natural, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON at character {error.pos}: {error.msg}") from None


def loads_config(data: bytes, max_values: int) -> Any:
    """Parse a config, which transformers reads with Python's reader and then copies often.

    ``NaN`` and ``Infinity`` are taken, as transformers writes them.

    :raises ValueError: with the reason: repeated keys, half a surrogate pair, numbers of more than
        forty digits, more than ``MAX_DEPTH`` levels or ``max_values`` values.
    """
    content = _parse(data, parse_int=_short_integer, parse_float=_short_float)
    _hold_to_limits(content, max_values)
    return content


def _parse(data: bytes, **options: Any) -> Any:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    try:
        return json.loads(text, object_pairs_hook=_unique, **options)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _hold_to_limits(content: Any, max_values: int) -> None:
    level, values = [content], 0
    for _ in range(MAX_DEPTH + 1):
        values += len(level)
        if values > max_values:
            raise ValueError(f"it holds more than {max_values:,} values")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                _refuse_surrogates(value)
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str):
                _refuse_surrogates((value,))
        if not below:
            return
        level = below
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def _refuse_surrogates(texts: Any) -> None:
    for text in texts:
        if not text.isascii() and _SURROGATE.search(text):
            raise ValueError("it holds half of a surrogate pair, which is no character")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {short(twice)} appears twice")
    return result


def short(value: object, length: int = 60) -> str:
    """Return ``repr(value)`` cut to some characters: a message repeats no megabytes."""
    if isinstance(value, str):
        value = value[: length + 1]
    elif isinstance(value, list | tuple) and len(value) > length:
        return f"a list of {len(value)} values"
    text = repr(value)
    return text if len(text) <= length + 2 else f"{text[:length]}..."


def _natural(digits: str) -> int:
    if digits.startswith("-") or len(digits) > _MAX_DIGITS:
        raise ValueError(f"{digits[:24]} is no natural number below 2**64")
    return int(digits)


def _short_integer(digits: str) -> int:
    return int(_short(digits))


def _short_float(digits: str) -> float:
    return float(_short(digits))


def _short(digits: str) -> str:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"{digits[:24]}... is a number of {len(digits)} digits")
    return digits


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
