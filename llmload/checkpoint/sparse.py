"""A file that comes here in pieces, as they are asked for, and is kept: sparse, with a record.

All processes of a machine share it, and none fetches what another has or is fetching. Bytes count
as there once they have reached the disk and stand in the record, so that a process may be killed at
any moment. The file ends in a mark that the record's lines are made with: it is never as long as
the one that it is made of, and a record says nothing of another file of its name.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import struct
import sys
import threading
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeAlias

from llmload.checkpoint.filesystem import sync
from llmload.checkpoint.folder import refuse
from llmload.checkpoint.reading import filled
from llmload.errors import CheckpointError

Get: TypeAlias = Callable[[int, int], bytes]
"""Fetches bytes: ``get(start, length)`` returns all of them or raises."""

THREADS: Final = 8
PIECE = 2**23
"""Bytes that are asked for at a time, so that as many threads have a bounded part in memory."""

_MARK: Final = 16
_LINE: Final = len(f"{0:016x} {0:016x} {0:08x}\n")
_CHUNK: Final = 2**20
_NO_LOCKS: Final = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class Intervals:
    """Which bytes of a file are there: ranges in order, none of which meets another."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, stop: int) -> None:
        """Note that bytes are there."""
        first = bisect_left(self._stops, start)
        behind = bisect_right(self._starts, stop)
        if first < behind:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[behind - 1])
        self._starts[first:behind] = [start]
        self._stops[first:behind] = [stop]

    def missing(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield what is not there of some bytes."""
        for number in range(bisect_right(self._stops, start), len(self._starts)):
            if self._starts[number] >= stop:
                break
            if start < self._starts[number]:
                yield start, self._starts[number]
            start = self._stops[number]
        if start < stop:
            yield start, stop


class _Record:
    """What is noted of one file, by all processes: lines that only its own mark makes."""

    def __init__(self, path: Path, mark: bytes, size: int) -> None:
        self.mark = mark
        self._path = path
        self._size = size
        self._lock = threading.Lock()
        self._there = Intervals()
        self._position = 0
        self._is_verified = False

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return what of some bytes nobody has noted."""
        with self._lock:
            found = list(self._there.missing(start, stop))
        if found:
            self.look()
            with self._lock:
                found = list(self._there.missing(start, stop))
        return found

    @property
    def awaits_proof(self) -> bool:
        """Whether all of the file is there, as far as is known, and nobody has compared it."""
        with self._lock:
            return not self._is_verified and not list(self._there.missing(0, self._size))

    def look(self) -> None:
        """Learn what others have noted. What is no whole line of this file counts for nothing."""
        with self._lock:
            try:
                with self._path.open("rb") as file:
                    file.seek(self._position)
                    found = file.read()
            except FileNotFoundError:
                return
            for at in range(0, len(found) - _LINE + 1, _LINE):
                self._position += _LINE
                line = found[at : at + _LINE]
                with suppress(ValueError):
                    start, stop, _ = (int(number, 16) for number in line.split())
                    if line == self._line(start, stop):
                        self._take(start, stop)

    def note(self, start: int, stop: int) -> None:
        """Add a line, also where a process that was killed left part of one.

        :raises OSError: it cannot be written.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            with _locked(descriptor):
                length = os.fstat(descriptor).st_size
                if length % _LINE:
                    os.ftruncate(descriptor, length - length % _LINE)
                os.write(descriptor, self._line(start, stop))
        finally:
            os.close(descriptor)
        with self._lock:
            self._take(start, stop)

    def note_proof(self) -> None:
        """Note that the whole file was compared with its digest."""
        self.note(self._size, self._size)

    def _take(self, start: int, stop: int) -> None:
        if start == self._size:
            self._is_verified = True
        else:
            self._there.add(start, stop)

    def _line(self, start: int, stop: int) -> bytes:
        text = f"{start:016x} {stop:016x}"
        return f"{text} {zlib.crc32(self.mark + text.encode()):08x}\n".encode()


class SparseFile:
    """One such file, to be read at any place by any thread.

    :param place: where it is kept, with its record beside it; its folder need not be there yet.
    :param size: bytes of the file that it is made of.
    :param get: fetches bytes of that file.
    :param sha256: of that file, if it is known; compared once all of it is there.
    """

    def __init__(self, place: Path, size: int, get: Get, sha256: str | None = None) -> None:
        self._place = place
        self._size = size
        self._get = get
        self._sha256 = sha256
        self._lock = threading.Lock()
        self._found: _Record | None = None

    def fetch(self, spans: Iterable[tuple[int, memoryview]]) -> None:
        """Fill each memory with the bytes from the place before it on.

        :raises CheckpointError: they cannot be fetched or kept, or the file is not what it was
            said to be.
        """
        spans = list(spans)
        with self._opened() as (_, record):
            missing = [
                piece
                for start, into in spans
                for hole in record.missing(start, start + len(into))
                for piece in pieces(*hole)
            ]
        if len(missing) > 1:
            with ThreadPoolExecutor(min(THREADS, len(missing)), "llmload-fetch") as pool:
                jobs = [pool.submit(self.prefetch, *piece) for piece in missing]
                try:
                    for job in jobs:
                        job.result()
                finally:
                    pool.shutdown(cancel_futures=True)
        with self._opened() as (descriptor, record):
            for start, into in spans:
                self._bring(descriptor, record, start, start + len(into))
                if not filled(descriptor, start, into):
                    raise self._damaged("it is cut off")

    def prefetch(self, start: int, stop: int) -> int:
        """Have some bytes lie on this machine; returns how many this call had to fetch.

        :raises CheckpointError: as :meth:`fetch`.
        """
        with self._opened() as (descriptor, record):
            return self._bring(descriptor, record, start, stop)

    @property
    def _record(self) -> Path:
        return self._place.with_name(f"{self._place.name}.ranges")

    def _bring(self, descriptor: int, record: _Record, start: int, stop: int) -> int:
        """Fetch what nobody has fetched, and wait for those who do."""
        count = 0
        for hole in record.missing(start, stop):
            with _locked(descriptor, *hole):
                for first, last in record.missing(*hole):
                    for piece in pieces(first, last):
                        self._keep(descriptor, record, *piece)
                    count += last - first
        if count:
            record.look()  # the last one of all processes sees that the file is whole
        if self._sha256 is not None and record.awaits_proof:
            self._verify(descriptor, record)
        return count

    def _keep(self, descriptor: int, record: _Record, start: int, stop: int) -> None:
        data = memoryview(self._get(start, stop - start))
        try:
            place = start
            while data:
                count = os.pwrite(descriptor, data, place)
                place, data = place + count, data[count:]
            os.fsync(descriptor)
            record.note(start, stop)
        except OSError as error:
            raise self._unwritten(error) from error

    def _verify(self, descriptor: int, record: _Record) -> None:
        """Compare the whole file with its digest, in one process of those that wait for it."""
        with _locked(descriptor, self._size, self._size + _MARK):
            record.look()
            if not record.awaits_proof:
                return
            digest = hashlib.sha256()
            for place in range(0, self._size, _CHUNK):
                digest.update(os.pread(descriptor, min(_CHUNK, self._size - place), place))
            if digest.hexdigest() != self._sha256:
                raise self._damaged(f"its SHA-256 is {digest.hexdigest()}, not {self._sha256}")
            try:
                record.note_proof()
            except OSError as error:
                raise self._unwritten(error) from error

    def _unwritten(self, error: OSError) -> CheckpointError:
        return refuse(
            self._place,
            f"what is fetched cannot be kept: {error.strerror}",
            "Make room there, or name another place by `cache_dir`.",
        )

    def _damaged(self, what: str) -> CheckpointError:
        for path in (self._record, self._place):  # whoever has it open keeps it
            path.unlink(missing_ok=True)
        return refuse(
            self._place,
            f"what was fetched is not the file that the hub lists: {what}",
            "Load again, which fetches it anew; what was there is removed.",
        )

    @contextmanager
    def _opened(self) -> Iterator[tuple[int, _Record]]:
        """Open the file, made if need be, and what is known of it."""
        try:
            descriptor = self._open()
        except OSError as error:
            raise self._unwritten(error) from error
        try:
            mark = os.pread(descriptor, _MARK, self._size)
            with self._lock:
                if self._found is None or self._found.mark != mark:
                    self._found = _Record(self._record, mark, self._size)
                record = self._found
            yield descriptor, record
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        found = self._there()
        if found is not None:
            return found
        self._place.parent.mkdir(parents=True, exist_ok=True)
        with self._place.with_name(".lock").open("ab") as lock, _locked(lock.fileno()):
            found = self._there()
            if found is None:
                self._make()
                found = os.open(self._place, os.O_RDWR)
            return found

    def _there(self) -> int | None:
        """Return the file's descriptor, if it is there and whole in length."""
        try:
            descriptor = os.open(self._place, os.O_RDWR)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size == self._size + _MARK:
            return descriptor
        os.close(descriptor)
        return None

    def _make(self) -> None:
        new = self._place.with_name(f".new-{self._place.name}")
        with new.open("wb") as file:
            file.truncate(self._size)
            file.seek(self._size)
            file.write(secrets.token_bytes(_MARK))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._place)
        sync(self._place.parent)


def pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield a range in pieces to be fetched one at a time."""
    for place in range(start, stop, PIECE):
        yield place, min(place + PIECE, stop)


@contextmanager
def _locked(descriptor: int, start: int = 0, stop: int = 0) -> Iterator[None]:
    """Hold others off some bytes of a file, or all of it, be they threads or processes.

    Where the file system has no locks, two may fetch the same: the same bytes, and no harm.
    """
    is_locked = _lock(descriptor, fcntl.F_WRLCK, start, stop)
    try:
        yield
    finally:
        if is_locked:
            _lock(descriptor, fcntl.F_UNLCK, start, stop)


def _lock(descriptor: int, kind: int, start: int, stop: int) -> bool:
    # Locks of an open file, which a thread does not share with the others of its process.
    command = getattr(fcntl, "F_OFD_SETLKW", None) if sys.platform == "linux" else None
    try:
        if command is None:
            fcntl.flock(descriptor, fcntl.LOCK_UN if kind == fcntl.F_UNLCK else fcntl.LOCK_EX)
        else:
            wanted = struct.pack("@hhqqi4x", kind, os.SEEK_SET, start, stop - start, 0)
            fcntl.fcntl(descriptor, command, wanted)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True
