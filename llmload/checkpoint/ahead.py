"""Has the kernel fetch what will be read of a checkpoint, by threads that read before it is used.

What they read stays in the page cache, where a mapping finds it. Whoever is about to look at some
of it waits until it is there, and has it fetched next.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmload.checkpoint.contents import CheckpointFile
from llmload.checkpoint.folder import open_regular, refuse
from llmload.checkpoint.open_files import hold
from llmload.checkpoint.page_cache import PageCache, expect, read_on
from llmload.checkpoint.ranges import ByteRange
from llmload.checkpoint.reading import Reading, filled

_MOST_OPEN = 8
"""Files that are kept open though nothing is read of them just now."""


@dataclass(slots=True, eq=False)
class _Piece:
    file: Path
    start: int
    stop: int
    behind: int
    """Bytes behind it that will be read too: so far the kernel may read on by itself."""
    left: int
    """Bytes that nobody has used yet."""
    state: Literal["waiting", "taken", "there"] = "waiting"


class ReadAhead(AbstractContextManager["ReadAhead"]):
    """Reads ranges of files in their order, so much ahead of their use.

    Threads begin at once. :meth:`finish` waits until all is there; at the end of the ``with`` block
    no thread and no descriptor is left, whatever happened.

    :param wanted: in the order of their files and bytes, none of them over another.
    :param room: bytes that may have been fetched and not been used; what stays on its pages is
        never used up. What is asked for is fetched all the same.
    """

    def __init__(
        self,
        files: Iterable[CheckpointFile],
        wanted: Iterable[ByteRange],
        reading: Reading,
        *,
        room: int,
    ) -> None:
        self._files = {file.path: file for file in files}
        self._room = room
        self._pieces = list(_pieces(wanted, reading.piece))
        self._of_file: dict[Path, list[_Piece]] = {}
        for piece in self._pieces:
            self._of_file.setdefault(piece.file, []).append(piece)
        self._starts = {
            file: [piece.start for piece in pieces] for file, pieces in self._of_file.items()
        }
        self.fetched = 0
        """Bytes that were read because they were not in memory."""
        self._ahead = 0
        self._next = 0
        self._urgent: deque[_Piece] = deque()
        self._is_last = False
        self._is_over = False
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._open: dict[Path, _Opened] = {}
        self._threads: list[threading.Thread] = []
        try:
            for _ in range(min(reading.threads, len(self._pieces))):
                thread = threading.Thread(
                    target=self._work, args=(reading.piece,), name="llmload-ahead"
                )
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        while self._open:
            self._open.popitem()[1].close()

    def need(self, file: Path, start: int, stop: int) -> None:
        """Wait until these bytes are in memory; those that are not ours are let be.

        :raises CheckpointError: a file could not be read.
        """
        with self._changed:
            if self._is_last:
                return  # what had no room is read as its pages are touched
            needed = list(self._over(file, start, stop))
            waiting = [piece for piece in needed if piece.state == "waiting"]
            if waiting:
                self._urgent.extend(waiting)
                self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._error is not None or all(p.state == "there" for p in needed)
            )
        self._hold()

    def used(self, file: Path, start: int, stop: int) -> None:
        """Note that nobody needs these bytes any more: as many others may be fetched."""
        with self._changed:
            for piece in self._over(file, start, stop):
                if piece.state == "waiting":
                    continue
                part = min(piece.left, min(stop, piece.stop) - max(start, piece.start))
                piece.left -= part
                self._ahead -= part
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait until all is there that there is room for.

        :raises CheckpointError: a file could not be read.
        """
        with self._changed:
            self._is_last = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._hold()

    def _hold(self) -> None:
        if self._error is not None:
            raise self._error

    def _over(self, file: Path, start: int, stop: int) -> Iterator[_Piece]:
        """Yield the pieces that bytes of a file lie in."""
        pieces = self._of_file.get(file, ())
        first = max(0, bisect_right(self._starts.get(file, ()), start) - 1)
        for number in range(first, len(pieces)):
            piece = pieces[number]
            if piece.start >= stop:
                return
            if piece.stop > start:
                yield piece

    def _take(self) -> _Piece | None:
        """Return the next piece to read; waits while there is no room, None at the end."""
        while not self._is_over and self._error is None:
            while self._urgent:
                piece = self._urgent.popleft()
                if piece.state == "waiting":
                    return piece
            while self._next < len(self._pieces) and self._pieces[self._next].state != "waiting":
                self._next += 1
            if self._next == len(self._pieces):
                return None
            if self._ahead < self._room:
                return self._pieces[self._next]
            if self._is_last:
                return None
            self._changed.wait()
        return None

    def _work(self, size: int) -> None:
        try:
            memory = memoryview(bytearray(size))
            while self._read_next(memory):
                pass
        except Exception as error:  # whoever waits is told, and nobody waits for ever
            with self._changed:
                self._error = self._error or error
        finally:
            with self._changed:
                self._changed.notify_all()

    def _read_next(self, memory: memoryview) -> bool:
        with self._changed:
            piece = self._take()
            if piece is None:
                return False
            piece.state = "taken"
            self._ahead += piece.left
        try:
            with self._in_use(piece.file) as file:
                count = file.fetch(piece, memory)
        except OSError as error:
            why = f"the file cannot be read: {error.strerror}"
            raise refuse(piece.file, why) from error
        with self._changed:
            self.fetched += count
            piece.state = "there"
            self._changed.notify_all()
        return True

    @contextmanager
    def _in_use(self, path: Path) -> Iterator[_Opened]:
        with self._changed:
            if path not in self._open:
                self._open[path] = _Opened(self._files[path])
            file = self._open[path]
            file.users += 1
        try:
            yield file
        finally:
            with self._changed:
                file.users -= 1
                idle = [path for path, file in self._open.items() if not file.users]
                for one in idle[: max(0, len(self._open) - _MOST_OPEN)]:
                    self._open.pop(one).close()


def _pieces(wanted: Iterable[ByteRange], size: int) -> Iterator[_Piece]:
    for file, start, stop in wanted:
        for place in range(start, stop, size):
            end = min(place + size, stop)
            yield _Piece(file, place, end, behind=stop - end, left=end - place)


class _Opened:
    """A file that is read in two ways: so that the kernel reads on, and so that it does not."""

    def __init__(self, file: CheckpointFile) -> None:
        self.users = 0
        self._cache: PageCache | None = None
        self._closing = ExitStack()
        try:
            self._onwards = self._descriptor(file, sequence=True)
            self._exactly = self._descriptor(file, sequence=False)
            with suppress(OSError):  # where it cannot be mapped, nothing is known
                self._cache = PageCache(self._exactly)
            self._read_on = read_on(self._exactly)
        except BaseException:
            self.close()
            raise

    def _descriptor(self, file: CheckpointFile, *, sequence: bool) -> int:
        descriptor, state = open_regular(file.path)
        self._closing.callback(os.close, descriptor)
        hold(file, state)
        expect(descriptor, sequence=sequence)
        return descriptor

    def close(self) -> None:
        """Give the descriptors back."""
        self._closing.close()

    def fetch(self, piece: _Piece, memory: memoryview) -> int:
        """Read a piece into the page cache; returns the bytes that were not there.

        A file that has become shorter is told of by whoever uses it.
        """
        if self._cache is not None and self._cache.holds(piece.start, piece.stop):
            return 0
        # Read on by the kernel, requests are larger, and fewer.
        reads_on = self._read_on is not None and piece.behind >= self._read_on
        descriptor = self._onwards if reads_on else self._exactly
        size = piece.stop - piece.start
        filled(descriptor, piece.start, memory[:size])
        return size
