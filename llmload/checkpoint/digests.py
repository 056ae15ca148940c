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
from pathlib import Path

from llmload.checkpoint.contents import Checkpoint, CheckpointFile
from llmload.checkpoint.folder import regular_file
from llmload.checkpoint.header import TensorInfo
from llmload.checkpoint.open_files import OpenFiles

SAMPLE = 256
"""Bytes read of each tensor; training moves nearly all values, in bfloat16 at least some."""
_CHUNK = 4 * 2**20
_BUFFER = 2**18
"""Bytes of a local file hashed at a time: they stay in the processor's own memory meanwhile."""


def of_samples(checkpoint: Checkpoint) -> str:
    """Return a digest of ``SAMPLE`` bytes of each tensor, at a place that its name decides.

    Reads nothing else, so it costs a page for each tensor. Equal files give equal digests wherever
    they lie. Of a file that is fetched its version stands for what is in it, if it has one.
    """
    digest = hashlib.sha256()
    versions = {file.path: file.version.encode() for file in checkpoint.files}
    infos = sorted(checkpoint.tensors.values(), key=lambda info: info.name)
    looked_into = [info for info in infos if not versions[info.file]]
    with OpenFiles(checkpoint.files) as files:
        samples = files.pieces(map(_sample, looked_into))
    found = {info.name: sample for info, sample in zip(looked_into, samples, strict=True)}
    for info in infos:
        digest.update(info.name.encode())
        digest.update(found.get(info.name, versions[info.file]))
    return digest.hexdigest()


def _sample(info: TensorInfo) -> tuple[Path, int, int]:
    """Return where in the files a sample of a tensor lies."""
    room = max(info.nbytes - SAMPLE, 0) + 1
    start = info.start + zlib.crc32(info.name.encode()) % room
    return info.file, start, min(SAMPLE, info.stop - start)


def of_weights(file: CheckpointFile, stop: threading.Event | None = None) -> str:
    """Return the SHA-256 of all bytes of a checkpoint's file, which may have to be fetched.

    :param stop: as for :func:`of_file`.
    :raises CheckpointError: it is gone, or no plain file.
    """
    if file.fetch is None:
        return of_file(file.path, stop)
    digest = hashlib.sha256()
    for start in range(0, file.size, _CHUNK):
        if stop and stop.is_set():
            break
        piece = bytearray(min(_CHUNK, file.size - start))
        file.fetch([(start, memoryview(piece))])
        digest.update(piece)
    return digest.hexdigest()


def of_file(path: Path, stop: threading.Event | None = None) -> str:
    """Return the SHA-256 of all bytes of a plain file; links are resolved already.

    :param stop: ends it early, with a digest of what was read by then.
    :raises CheckpointError: it is gone, or no plain file.
    """
    digest = hashlib.sha256()
    buffer = bytearray(_BUFFER)
    with regular_file(path) as (descriptor, _), os.fdopen(os.dup(descriptor), "rb", 0) as file:
        while (count := file.readinto(buffer)) and not (stop and stop.is_set()):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
