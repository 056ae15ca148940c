"""safetensors files byte by byte, so that tests can write what no library would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ITEM_BYTES = {"F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1}


def entry(dtype: str, shape: list[int], start: int) -> dict[str, Any]:
    """One tensor of a header whose bytes begin at ``start`` of the data."""
    count = 1
    for size in shape:
        count *= size
    return {
        "dtype": dtype,
        "shape": shape,
        "data_offsets": [start, start + count * ITEM_BYTES[dtype]],
    }


def write(path: Path, header: dict[str, Any] | str | bytes, data: bytes | int = 0) -> Path:
    """Write a file of this header and ``data``, or so many zero bytes of data."""
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    body = bytes(data) if isinstance(data, int) else data
    return overwrite(path, len(raw).to_bytes(8, "little") + raw + body)


def overwrite(path: Path, content: bytes) -> Path:
    """Like ``write_bytes``, without the flush to disk that emptying a file can cost."""
    path.touch()
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()
    return path
