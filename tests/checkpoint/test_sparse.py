"""A file that comes in pieces: each byte once, over threads, processes and kills, and never a hole
for a value."""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import llmload
from llmload.checkpoint import sparse
from llmload.checkpoint.sparse import Intervals, SparseFile

DATA = bytes(range(1, 251)) * 400
SHA256 = hashlib.sha256(DATA).hexdigest()


class Source:
    """Gives bytes of :data:`DATA`, and writes down which."""

    def __init__(self, log: Path, wait: float = 0.0) -> None:
        self._log = log
        self._wait = wait

    def get(self, start: int, length: int) -> bytes:
        with self._log.open("a") as log:
            log.write(f"{start} {length}\n")
        time.sleep(self._wait)
        return DATA[start : start + length]

    @property
    def given(self) -> list[tuple[int, int]]:
        if not self._log.exists():
            return []
        lines = [line.split() for line in self._log.read_text().splitlines()]
        return [(int(start), int(start) + int(length)) for start, length in lines]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path / "log")


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "PIECE", 1000)


def file_of(tmp_path: Path, source: Source, sha256: str | None = SHA256) -> SparseFile:
    return SparseFile(tmp_path / "spans" / "model", len(DATA), source.get, sha256)


def read(file: SparseFile, start: int, stop: int) -> bytes:
    data = bytearray(stop - start)
    file.fetch([(start, memoryview(data))])
    return bytes(data)


def each_once(given: list[tuple[int, int]]) -> int:
    """Hold that no byte was given twice; returns how many were."""
    last = 0
    for start, stop in sorted(given):
        assert start >= last, f"bytes from {start} on were fetched twice"
        last = stop
    return sum(stop - start for start, stop in given)


def test_intervals_know_what_is_missing() -> None:
    found = Intervals()
    assert list(found.missing(3, 9)) == [(3, 9)]
    for start, stop in ((10, 20), (30, 40), (20, 22), (5, 7)):
        found.add(start, stop)
    assert list(found.missing(0, 50)) == [(0, 5), (7, 10), (22, 30), (40, 50)]
    assert list(found.missing(12, 21)) == []
    found.add(6, 35)
    assert list(found.missing(0, 50)) == [(0, 5), (40, 50)]
    assert list(found.missing(4, 4)) == []


def test_what_is_read_is_fetched_once_and_nothing_else(tmp_path: Path, source: Source) -> None:
    file = file_of(tmp_path, source)
    assert read(file, 100, 3500) == DATA[100:3500]
    assert read(file, 50, 200) == DATA[50:200]
    assert file.prefetch(3000, 4000) == 500
    assert each_once(source.given) == 3950
    again = file_of(tmp_path, source)
    assert read(again, 50, 4000) == DATA[50:4000]
    assert each_once(source.given) == 3950


def test_a_file_that_came_whole_is_compared_with_its_digest_once(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = file_of(tmp_path, source)
    assert read(file, 0, len(DATA)) == DATA
    monkeypatch.setattr(hashlib, "sha256", None)
    assert read(file_of(tmp_path, source), 0, len(DATA)) == DATA


def test_a_whole_file_with_another_digest_is_removed(tmp_path: Path, source: Source) -> None:
    file = file_of(tmp_path, source, hashlib.sha256(b"another").hexdigest())
    read(file, 0, len(DATA) - 1)
    with pytest.raises(llmload.CheckpointError, match="is not the file that the hub lists"):
        read(file, len(DATA) - 1, len(DATA))
    assert [path.name for path in (tmp_path / "spans").iterdir()] == [".lock"]
    assert read(file_of(tmp_path, source), 0, 10) == DATA[:10]


def test_threads_that_want_the_same_fetch_it_once(tmp_path: Path) -> None:
    source = Source(tmp_path / "log", wait=0.002)
    file = file_of(tmp_path, source)
    with ThreadPoolExecutor(8) as pool:
        places = [(n * 700, n * 700 + 5000) for n in range(20)] * 2
        for (start, stop), data in zip(
            places, pool.map(lambda place: read(file, *place), places), strict=True
        ):
            assert data == DATA[start:stop]
    assert each_once(source.given) == 19 * 700 + 5000


def _read_all(tmp_path: Path, wait: float, number: int) -> None:
    sparse.PIECE = 1000
    file = file_of(tmp_path, Source(tmp_path / "log", wait))
    for place in range(number * 1500, len(DATA), 5000):
        stop = min(place + 4000, len(DATA))
        if read(file, place, stop) != DATA[place:stop]:
            os._exit(3)


def test_processes_fetch_each_byte_once(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("fork")
    running = [processes.Process(target=_read_all, args=(tmp_path, 0.001, n)) for n in range(3)]
    for one in running:
        one.start()
    for one in running:
        one.join(60)
    assert [one.exitcode for one in running] == [0, 0, 0]
    each_once(Source(tmp_path / "log").given)


def test_nothing_that_a_killed_process_left_is_taken_for_fetched(
    tmp_path: Path, source: Source
) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=_read_all, args=(tmp_path, 0.01, 0)
    )
    process.start()
    while len(source.given) < 10:
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    at_kill = len(source.given)
    file = file_of(tmp_path, source)
    assert read(file, 0, len(DATA)) == DATA
    later = source.given[at_kill:]
    assert each_once(later) < len(DATA)


def test_a_line_that_was_cut_off_or_changed_counts_for_nothing(
    tmp_path: Path, source: Source
) -> None:
    read(file_of(tmp_path, source), 0, 100)
    record = tmp_path / "spans" / "model.ranges"
    line = record.read_bytes()
    record.write_bytes(line.replace(b"64 ", b"65 ") + line[:-5])
    file = file_of(tmp_path, source)
    assert read(file, 0, 200) == DATA[:200]
    assert source.given[1:] == [(0, 200)]
    assert read(file_of(tmp_path, source), 0, 200) == DATA[:200]
    assert source.given[2:] == []


def test_a_record_says_nothing_of_another_file_of_its_name(tmp_path: Path, source: Source) -> None:
    read(file_of(tmp_path, source), 0, 100)
    file = file_of(tmp_path, source)
    read(file, 0, 50)
    (tmp_path / "spans" / "model").unlink()
    assert read(file, 0, 100) == DATA[:100]
    assert source.given == [(0, 100), (0, 100)]


def test_where_a_file_system_has_no_locks_it_works_without(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "fcntl", refused)
    monkeypatch.setattr(fcntl, "flock", refused)
    assert read(file_of(tmp_path, source), 0, 5000) == DATA[:5000]


def test_what_cannot_be_kept_is_told(tmp_path: Path, source: Source) -> None:
    (tmp_path / "spans").write_text("a file")
    with pytest.raises(llmload.CheckpointError, match="what is fetched cannot be kept"):
        read(file_of(tmp_path, source), 0, 10)


def test_an_error_of_the_source_ends_all_threads(tmp_path: Path) -> None:
    def get(start: int, length: int) -> bytes:
        raise llmload.CheckpointError("gone")

    file = SparseFile(tmp_path / "model", len(DATA), get)
    with pytest.raises(llmload.CheckpointError, match="gone"):
        read(file, 0, len(DATA))
    assert not [one for one in threading.enumerate() if one.name.startswith("llmload-fetch")]
