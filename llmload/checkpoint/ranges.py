"""Which bytes of a checkpoint's files a load will read, known before it reads any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import nn

    from llmload.checkpoint.accounting import Accounting
    from llmload.checkpoint.placement import Placement


class ByteRange(NamedTuple):
    """A piece of one file."""

    file: Path
    start: int
    """First byte, counted from the start of the file."""
    stop: int
    """One past the last."""


def ranges(
    model: nn.Module, accounting: Accounting, placement: Placement
) -> list[ByteRange] | None:
    """Return what this process will read, file by file and in the order of the bytes.

    :param model: prepared by the placement.
    :param placement: says what it will ask for by :meth:`llmload.plugin.Plain.extent`.
    :return: None where it does not say.
    """
    extent = getattr(placement, "extent", None)
    if extent is None:
        return None

    def elements(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
        path, _, attribute = name.rpartition(".")
        start, stop = extent(name, model.get_submodule(path), attribute, shape)
        return start, stop

    def asked() -> Iterator[ByteRange]:
        for info in accounting.computed:
            yield ByteRange(info.file, info.start, info.stop)
        for name, info in accounting.as_stored.items():
            start, stop = elements(name, info.shape)
            size = info.nbytes // max(1, info.numel)
            yield ByteRange(info.file, info.start + start * size, info.start + stop * size)
        for name, value in accounting.assembled.items():
            for piece in value.pieces(*elements(name, value.shape)):
                info = value.origin(piece)
                first = info.start + int(piece.storage_offset()) * piece.itemsize
                yield ByteRange(info.file, first, first + piece.nbytes)

    return list(_joined(asked()))


def _joined(found: Iterable[ByteRange]) -> Iterator[ByteRange]:
    """Yield ranges in order, those that meet or overlap as one."""
    last: ByteRange | None = None
    for one in sorted(found):
        if one.start == one.stop:
            continue
        if last is not None and one.file == last.file and one.start <= last.stop:
            last = last._replace(stop=max(last.stop, one.stop))
            continue
        if last is not None:
            yield last
        last = one
    if last is not None:
        yield last
