"""Digests of what a checkpoint's files hold: of samples of every tensor, or of every byte.

Headers say nothing of values: a base model and what was tuned from it have the same ones. A sample
tells them apart at the cost of one small read for each tensor; only a digest of everything tells
that nothing at all differs.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmload.checkpoint.contents import Checkpoint
from llmload.checkpoint.folder import regular_file

SAMPLE = 256
"""Bytes read of each tensor; training moves nearly all values, in bfloat16 at least some."""
_CHUNK = 4 * 2**20


def of_samples(checkpoint: Checkpoint) -> str:
    """Return a digest of ``SAMPLE`` bytes of each tensor, at a place that its name decides.

    Reads nothing else, so it costs a page for each tensor. Equal files give equal digests wherever
    they lie.
    """
    digest = hashlib.sha256()
    with _opened(file.path for file in checkpoint.files) as descriptors:
        for info in sorted(checkpoint.tensors.values(), key=lambda info: info.name):
            room = max(info.nbytes - SAMPLE, 0) + 1
            start = info.start + zlib.crc32(info.name.encode()) % room
            length = min(SAMPLE, info.stop - start)
            digest.update(info.name.encode())
            digest.update(os.pread(descriptors[info.file], length, start))
    return digest.hexdigest()


def of_file(path: Path, stop: threading.Event | None = None) -> str:
    """Return the SHA-256 of all bytes of a plain file; links are resolved already.

    :param stop: ends it early, with a digest of what was read by then.
    :raises CheckpointError: it is gone, or no plain file.
    """
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    with regular_file(path) as (descriptor, _), os.fdopen(os.dup(descriptor), "rb", 0) as file:
        while (count := file.readinto(buffer)) and not (stop and stop.is_set()):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


@contextmanager
def _opened(paths: Iterable[Path]) -> Iterator[dict[Path, int]]:
    descriptors: dict[Path, int] = {}
    try:
        for path in paths:
            descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        yield descriptors
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
