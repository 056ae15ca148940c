"""What ``tokenizer.json`` and ``tokenizer.model`` make of a load, before Rust reads them.

The costs that their sizes do not show, of tokenizers 0.21 and 0.23: an added token takes a time
that grows with the square of its length; each byte of a Unigram piece is a node of a trie, of 300
bytes and one stack frame when it is freed; and each step of a text's way through the tokenizer may
make it longer by a factor, which the next multiplies.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Final

# An escaped letter or underscore: no tokenizer writes any, and a key may be hidden so.
_ESCAPED: Final = re.compile(r"\\u00[5-7]")
_VALUE: Final = re.compile(r"\s*:\s*(?=[\[{])")
_STEPS: Final = ("normalizer", "pre_tokenizer", "post_processor")
_PARTS: Final = ("added_tokens", *_STEPS)

_PIECE_TAG: Final = 0x0A
"""Of field 1, a message, in sentencepiece's ``ModelProto``."""
_VARINT, _FIXED64, _MESSAGE, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Serialized:
    """The parts of a ``tokenizer.json`` whose cost is not that of their bytes."""

    added: list[str]
    """Text of each added token."""
    pieces: list[int]
    """Bytes of each piece, where the model is Unigram."""
    growth: float
    """By what factor a text may become longer on its way to ids."""


def read(data: bytes) -> Serialized:
    """Read those parts; of words and merges, tens of megabytes, nothing is parsed.

    :raises ValueError: with the reason, where it is no JSON.
    """
    text = data.decode()
    found = {key: list(_values(text, key)) for key in _PARTS}
    is_unigram = any(text[at] == "[" for at in _values(text, "vocab"))
    content: Any
    try:
        if is_unigram or max(map(len, found.values())) > 1 or _ESCAPED.search(text):
            content = json.loads(text)
        else:
            decode = json.JSONDecoder().raw_decode
            content = {key: decode(text, at)[0] for key, places in found.items() for at in places}
        steps = [_growth(_value(content, step)) for step in _STEPS]
    except RecursionError:
        raise ValueError("nested too deeply") from None
    added = [_value(token, "content") for token in _list(content, "added_tokens")]
    pieces = [piece[0] for piece in _list(_value(content, "model"), "vocab") if _filled(piece)]
    return Serialized(
        added=[token for token in added if isinstance(token, str)],
        pieces=[len(piece.encode(errors="replace")) for piece in pieces if isinstance(piece, str)],
        growth=prod(steps),
    )


def _values(text: str, key: str) -> Iterator[int]:
    """Yield where a list or an object begins that stands under a key, at whatever depth."""
    quoted = f'"{key}"'
    at = text.find(quoted)
    while at >= 0:
        value = _VALUE.match(text, at + len(quoted))
        if value:
            yield value.end()
        at = text.find(quoted, at + 1)


def _growth(step: Any) -> float:
    """Return by what factor a step, or one in it, makes a text longer at the most.

    Steps are known by their fields, since old files do not name their types.
    """
    if isinstance(step, list):
        return prod(map(_growth, step), start=1.0)
    if not isinstance(step, dict):
        return 1.0
    own = 1.0
    replacement, pattern = step.get("content"), step.get("pattern")
    if isinstance(replacement, str) and replacement:
        replaced = _value(pattern, "String")
        # A pattern may match between any two characters, and the empty one does.
        own *= len(replacement) / len(replaced) if _filled(replaced) else 1 + len(replacement)
    if isinstance(step.get("prepend"), str):
        own *= 1 + len(step["prepend"])
    if isinstance(step.get("precompiled_charsmap"), str):
        own *= _longest_mapped(step["precompiled_charsmap"])
    if step.get("type") == "ByteLevel":
        own *= 2  # one character for each byte, of which half have two
    tokens = step.get("special_tokens")
    ids = (
        [len(_list(token, "ids")) for token in tokens.values()] if isinstance(tokens, dict) else []
    )
    own *= max(1, len(_list(step, "single")), len(_list(step, "pair"))) * max([1, *ids])
    return max(1.0, own) * prod(map(_growth, step.values()), start=1.0)


def _longest_mapped(charsmap: str) -> int:
    """Return the bytes of the longest text that sentencepiece's table has for one character.

    The table is a trie, its size before it, and texts that end in zeros.
    """
    try:
        table = base64.b64decode(charsmap)
    except ValueError:
        return 1  # tokenizers refuses it
    trie = int.from_bytes(table[:4], "little")
    return max(1, *map(len, table[4 + trie :].split(b"\0")))


def _filled(value: Any) -> bool:
    return isinstance(value, list | str) and len(value) > 0


def _value(content: Any, key: str) -> Any:
    return content.get(key) if isinstance(content, dict) else None


def _list(content: Any, key: str) -> list[Any]:
    value = _value(content, key)
    return value if isinstance(value, list) else []


def piece_lengths(data: bytes) -> Iterator[int]:
    """Yield the bytes of each piece of a sentencepiece model, score and type among them.

    What follows something that is no field of a protobuf is not looked at, as no reader does.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _MESSAGE:
            length, at = _varint(data, at)
            if tag == _PIECE_TAG:
                yield length
            at += length
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            return


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number in groups of seven bits, and where it ends."""
    number = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            break
    return number, at
