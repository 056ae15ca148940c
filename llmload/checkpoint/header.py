"""The header of a safetensors file, read strictly and without the safetensors package.

Layout of the format: eight bytes, little endian, give the length N of a JSON object that follows
at once; the rest of the file is the tensors' bytes. Each entry of the object gives a dtype, a shape
and two offsets into those bytes. The tensors must cover the bytes from first to last, each byte
once. We refuse what the reference reader (0.8.0) lets pass and another reader may take differently:
repeated names, a header that starts with blanks, unknown fields, names with control characters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmload.checkpoint import strict_json
from llmload.checkpoint.strict_json import short
from llmload.errors import CheckpointError

MAX_HEADER_BYTES = 25_000_000
"""The hub refuses longer headers; the reference reader stops at 100 MB."""

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
        **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
        **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
        **dict.fromkeys(("U32", "I32", "F32"), 32),
        **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    }
)
"""Bits of one element by the format's dtype name."""

_LENGTH_BYTES = 8
DESCRIBED = "The plugin that describes the checkpoint is at fault, or its files are."
"""What to do where a checkpoint is not what a plugin says of it."""
_AHEAD = 2**17
"""Bytes with which most headers are read at once."""
_MAX_DIMENSIONS = 64
_MAX_NAME = 1000
_MANY = 20_000
"""Tensors that may be as small as they like."""
_BYTES_EACH = 1024
"""Bytes that more of them have on average; those of the largest models have thousands."""
_FIELDS = {"dtype", "shape", "data_offsets"}
_NOT_DOWNLOADED = "Fetch the weights first, for example with git lfs pull."
_DAMAGED = "Download or save the file again."
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: bytes ``start`` (inclusive) to ``stop`` (exclusive) of ``file``."""

    name: str
    file: Path
    dtype: str
    """As safetensors spells it: ``BF16``, ``F32``, ..."""
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


Read = Callable[[int, int], bytes]
"""Returns so many bytes of a file, the second argument, from the first on; fewer at its end."""


def read_header(read: Read, path: Path, size: int) -> tuple[list[TensorInfo], dict[str, str]]:
    """Read and check the header of ``path``, which ``read`` reads and is ``size`` bytes long.

    Returns the tensors in file order and the file's free metadata. Reads the header and nothing
    after it.

    :raises CheckpointError: with the file, and the byte counts where it is cut off.
    """
    try:
        return _parse(_header_bytes(read, size), path, size)
    except _DamagedError as error:
        raise CheckpointError(str(error), fix=error.fix, where=str(path)) from None


def read_header_afar(read: Read, path: Path, size: int) -> tuple[list[TensorInfo], dict[str, str]]:
    """Read and check the header of a file that is somewhere else, as :func:`read_header` does.

    ``read(start, length)`` returns bytes of it. No more is asked for than a header may have.
    """
    begin = read(0, min(size, _AHEAD))

    def read_on(start: int, length: int) -> bytes:
        there, stop = begin[start : start + length], start + length
        return there if stop <= len(begin) else there + read(len(begin), stop - len(begin))

    return read_header(read_on, path, size)


def hold_to_rules(info: TensorInfo, size: int) -> None:
    """Hold what a plugin says of a tensor to what a header may say of one.

    :param size: bytes of its file.
    :raises CheckpointError: name, dtype, shape or place cannot be.
    """
    try:
        check_name(info.name)
        _check_kind(info.name, info.dtype, list(info.shape))
        if not 0 <= info.start <= info.stop <= size:
            raise _DamagedError(
                f"tensor {info.name!r} lies at bytes {info.start} to {info.stop} of {size}"
            )
        _check_bytes(info.name, info.dtype, list(info.shape), info.nbytes)
    except _DamagedError as error:
        raise CheckpointError(str(error), fix=DESCRIBED, where=str(info.file)) from None


class _DamagedError(ValueError):
    def __init__(self, message: str, fix: str = _DAMAGED) -> None:
        super().__init__(message)
        self.fix = fix


def _header_bytes(read: Read, size: int) -> bytes:
    start = read(0, min(64, size))
    if start.startswith(b"version https://git-lfs"):
        raise _DamagedError("a Git LFS pointer lies where the weights should be", _NOT_DOWNLOADED)
    if size < _LENGTH_BYTES + 2:
        raise _DamagedError(f"the file has {size} bytes, too few for a safetensors header")
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    # A header of 640 bytes begins like a pickle too, but no pickle has this brace.
    if start.startswith(_PICKLE_STARTS) and start[_LENGTH_BYTES:][:1] != b"{":
        raise _DamagedError(
            "the file is a pickle or zip archive, not safetensors",
            "Convert it to safetensors; renaming does not.",
        )
    if length > MAX_HEADER_BYTES:
        raise _DamagedError(
            f"the header claims {length} bytes, more than the {MAX_HEADER_BYTES} allowed"
        )
    if length > size - _LENGTH_BYTES:
        raise _DamagedError(
            f"the header claims {length} bytes, but the file is cut off after {size} bytes"
        )
    header = read(_LENGTH_BYTES, length)
    if len(header) != length:
        raise _DamagedError(f"the file shrank while its header of {length} bytes was read")
    if not header.startswith(b"{"):
        raise _DamagedError("the header does not begin with '{'")
    return header


def _parse(header: bytes, path: Path, size: int) -> tuple[list[TensorInfo], dict[str, str]]:
    try:
        entries = strict_json.loads(header)
    except ValueError as error:
        raise _DamagedError(f"the header is unreadable: {error}") from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _DamagedError("the header's __metadata__ is not a mapping of strings to strings")
    if not entries:
        raise _DamagedError("the header lists no tensor")
    data_start = _LENGTH_BYTES + len(header)
    if is_no_model(len(entries), size - data_start):
        raise _DamagedError(
            f"the header lists {len(entries):,} tensors of {size - data_start:,} bytes in all,"
            " which is no model"
        )
    tensors = [_entry(path, name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    _check_coverage(tensors, data_start, size)
    return tensors, metadata


def is_no_model(tensors: int, nbytes: int) -> bool:
    """Say whether there are tens of thousands of tensors with next to nothing in them.

    Each costs whoever looks at it, and there are many, microseconds.
    """
    return tensors > _MANY and nbytes < _BYTES_EACH * tensors


def _entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    check_name(name)
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise _DamagedError(f"tensor {name!r} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    _check_kind(name, dtype, shape)
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _DamagedError(f"tensor {name!r} has the impossible data_offsets {short(offsets)}")
    start, stop = offsets
    _check_bytes(name, dtype, shape, stop - start)
    return TensorInfo(name, path, dtype, tuple(shape), data_start + start, data_start + stop)


def _check_kind(name: str, dtype: Any, shape: Any) -> None:
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _DamagedError(f"tensor {name!r} has the unknown dtype {short(dtype)}")
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS or not _countable(shape):
        raise _DamagedError(f"tensor {name!r} has the impossible shape {short(shape)}")


def _check_bytes(name: str, dtype: str, shape: list[int], nbytes: int) -> None:
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != nbytes * 8:
        raise _DamagedError(
            f"tensor {name!r} of dtype {dtype} and shape {shape} needs {bits / 8:g} bytes, "
            f"but its data_offsets span {nbytes}"
        )


def _countable(shape: list[int]) -> bool:
    """Say whether 63 bits count the elements that the sizes other than 0 would make."""
    product = 1
    for size in shape:
        product *= size or 1
        if product >= 2**63:  # not at the end: the whole product may have a million digits
            return False
    return True


def check_name(name: str) -> None:
    """Refuse tensor names that no module can have or that read as a path out of a folder."""
    if len(name) > _MAX_NAME:
        raise _DamagedError(f"the tensor name {short(name)} has {len(name)} characters")
    parts = name.replace("\\", "/").split("/")
    if not name or not name.isprintable() or ".." in parts or (len(parts) > 1 and not parts[0]):
        raise _DamagedError(f"the tensor name {name!r} is not allowed")


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _check_coverage(tensors: list[TensorInfo], data_start: int, size: int) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            kind = "overlaps the one before it" if tensor.start < position else "follows a hole"
            raise _DamagedError(f"tensor {tensor.name!r} {kind}")
        position = tensor.stop
    if position != size:
        kind = "cut off" if size < position else "too long"
        raise _DamagedError(f"the file is {kind}: expected {position} bytes, found {size}")
