"""Brings nearer what will be read of files that are fetched and kept, by several threads."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

from llmload.checkpoint.contents import CheckpointFile
from llmload.checkpoint.ranges import ByteRange
from llmload.checkpoint.sparse import THREADS, pieces


class Prefetching(AbstractContextManager["Prefetching"]):
    """Has ranges of files fetched in their order, beginning at once.

    Whoever reads some of it sooner fetches that itself, or waits for the thread that does. At the
    end of the ``with`` block no thread is left, whatever happened.

    :param wanted: in the order of their files and bytes; of files that have a ``prefetch``.
    """

    def __init__(self, files: Iterable[CheckpointFile], wanted: Iterable[ByteRange]) -> None:
        prefetch = {file.path: file.prefetch for file in files}
        self._pool = ThreadPoolExecutor(THREADS, "llmload-fetch")
        self._jobs: list[Future[int]] = []
        for file, start, stop in wanted:
            call = prefetch[file]
            assert call is not None
            self._jobs += (self._pool.submit(call, *piece) for piece in pieces(start, stop))

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def finish(self) -> int:
        """Wait until all is there; returns the bytes that had to be fetched.

        :raises CheckpointError: some could not be.
        """
        return sum(job.result() for job in self._jobs)
