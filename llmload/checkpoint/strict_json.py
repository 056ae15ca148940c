"""JSON as the safetensors reference reader takes it, and no wider.

Python's reader accepts more than RFC 8259 (``NaN``, repeated keys, lone surrogates, ``-0`` as an
integer). Two readers that disagree about one header are how one file shows different weights to
different programs, so everything doubtful is refused.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

_MAX_DIGITS = 20  # 2**64 - 1 has twenty


def loads(data: bytes) -> Any:
    """Parse ``data``, raising ``ValueError`` with the reason where any reader could object."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_int=_natural, parse_constant=_refuse_constant
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON at character {error.pos}: {error.msg}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} appears twice")
    return result


def _natural(digits: str) -> int:
    if digits.startswith("-") or len(digits) > _MAX_DIGITS:
        raise ValueError(f"{digits[:24]} is no natural number below 2**64")
    return int(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
