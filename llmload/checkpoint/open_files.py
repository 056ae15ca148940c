"""A checkpoint's files, few of them open at a time: a process may have no more than 256 open."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from llmload.checkpoint.contents import CheckpointFile, identity
from llmload.checkpoint.folder import open_regular, refuse
from llmload.checkpoint.page_cache import expect

_MOST: Final = 16
"""Tensors are asked for file by file, or of the few files that a layer lies in."""


class OpenFiles(AbstractContextManager["OpenFiles"]):
    """Opens the files of a checkpoint as they are asked for, and closes those not used lately.

    Each is held to what it was when its header was checked, whenever it is asked for.
    """

    def __init__(self, files: Iterable[CheckpointFile]) -> None:
        self._files = {file.path: file for file in files}
        self._open: OrderedDict[Path, int] = OrderedDict()

    def __exit__(self, *exc: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def descriptor(self, path: Path) -> int:
        """Return a file's descriptor, to be used before another file is asked for.

        :raises CheckpointError: it cannot be opened, or has changed since its header was checked.
        """
        if path in self._open:
            self._open.move_to_end(path)
        else:
            if len(self._open) == _MOST:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = open_regular(path)[0]
        hold(self._files[path], os.fstat(self._open[path]))
        return self._open[path]

    def pieces(self, places: Iterable[tuple[Path, int, int]]) -> list[bytearray]:
        """Return bytes of the files: of a path, from a place on, so many; those of one file that is
        fetched are asked for at once.

        :raises CheckpointError: as :meth:`descriptor`, or a file ends before.
        """
        found: list[bytearray] = []
        to_fetch: dict[Path, list[tuple[int, memoryview]]] = {}
        latest, descriptor = None, -1
        for path, start, length in places:
            if self._files[path].fetch is None:
                if path != latest:
                    latest, descriptor = path, self.descriptor(path)
                    expect(descriptor, sequence=False)
                piece = bytearray(os.pread(descriptor, length, start))
                if len(piece) != length:
                    raise changed(path)
            else:
                piece = bytearray(length)
                to_fetch.setdefault(path, []).append((start, memoryview(piece)))
            found.append(piece)
        for path, spans in to_fetch.items():
            fetch = self._files[path].fetch
            assert fetch is not None
            fetch(spans)
        return found


def hold(file: CheckpointFile, state: os.stat_result) -> None:
    """Raise ``CheckpointError`` where an open file is not what it was when its header was checked.

    :param state: of the open file.
    """
    if (state.st_size, identity(state)) != (file.size, file.identity):
        raise changed(file.path)


def changed(path: Path) -> Exception:
    """The error about a file that is no longer what its header said, to be raised by the caller."""
    return refuse(
        path,
        "the file changed while it was being loaded",
        "Load again when nothing writes to the folder.",
    )
