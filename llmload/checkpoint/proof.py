"""What was read and what was placed, tensor by tensor: the engine's part of the report."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmload.errors import LoadFailedError

if TYPE_CHECKING:
    import torch

    from llmload.checkpoint.mapped import MappedCheckpoint


@dataclass(frozen=True, slots=True)
class Digest:
    """SHA-256 of one parameter's bytes as they were read, and as they were placed."""

    read: str
    """Of what the placement asked for, after conversion and before the cast, in the checkpoint's
    dtype: the whole value, or the part that this process keeps. Empty where it asked for nothing,
    because it had the value already."""
    placed: str
    """Of the value in its final storage."""


class Proof(AbstractContextManager["Proof"]):
    """Counts how each weight was placed and, if asked, compares digests.

    Without digests a weight that lies on the file's own pages is proven by its address, and costs
    no read. With digests the value is hashed in a second thread while the placement works, and a
    weight that was placed as it was read must hash to the same.
    """

    def __init__(self, *, digests: bool = False) -> None:
        self.mapped = 0
        """Parameters and buffers that lie on the file's own pages."""
        self.copied = 0
        """All others: cast, moved, converted, quantised or partitioned."""
        self.converted = 0
        """Those merged, split or permuted by transformers on the way; among the copied."""
        self.digests: dict[str, Digest | None] = {}
        """By name in the model; empty unless asked for. None for what is not compared yet."""
        self._pool = ThreadPoolExecutor(1, "llmload-digest") if digests else None

    def reading(self) -> Reading:
        """Return what is to be told of each part of one value that is read."""
        return Reading(self._pool)

    def count(self, name: str, placed: torch.Tensor, address: int | None) -> None:
        """Enter one placed weight; ``address`` is its place in the mapped file, None if converted.

        It need not have its values yet.
        """
        self.converted += address is None
        if placed.data_ptr() == address:
            self.mapped += 1
        else:
            self.copied += 1
        if self._pool is not None:
            self.digests[name] = None  # compared in the order of completion, told in this one

    def compare(self, name: str, placed: torch.Tensor, reading: Reading) -> None:
        """Hash a weight that has its values now; any thread may.

        :raises LoadFailedError: it was placed as it was read and differs from it.
        """
        if self._pool is None:
            return
        digest = Digest(reading.digest() if reading.numel else "", sha256(placed))
        self.digests[name] = digest
        # Cast, quantised or split values are other bytes by right: the report has both digests.
        unchanged = (placed.dtype, placed.numel()) == (reading.dtype, reading.numel)
        if unchanged and digest.read != digest.placed:
            raise LoadFailedError(
                f"{name!r} was placed with other bytes than were read from the checkpoint",
                fix="The memory of this machine or the placement plugin is at fault; load again.",
            )

    def __exit__(self, *exc: object) -> None:
        if self._pool:
            self._pool.shutdown()

    def facts(self, files: MappedCheckpoint) -> dict[str, Any]:
        """Everything for the report, as JSON values."""
        facts: dict[str, Any] = {
            "files": files.checkpoint.reads_per_file(files.bytes_read, files.reads),
            "mapped": self.mapped,
            "copied": self.copied,
            "converted": self.converted,
        }
        if self.digests:
            facts["sha256"] = {
                name: {"read": digest.read, "placed": digest.placed}
                for name, digest in self.digests.items()
                if digest is not None
            }
        return facts


class Reading:
    """Hashes the parts of one value that are read, in their order, in another thread."""

    def __init__(self, pool: ThreadPoolExecutor | None) -> None:
        self.dtype: torch.dtype | None = None
        """As stored in the checkpoint; None until something is read."""
        self.numel = 0
        """Elements that were read."""
        self.hashes = pool is not None
        """Whether it looks at every value."""
        self._pool = pool
        self._hash = hashlib.sha256()
        self._last: Future[None] | None = None

    def add(self, part: torch.Tensor) -> None:
        """Start to hash a part."""
        self.dtype = part.dtype
        self.numel += part.numel()
        if self._pool:
            self._last = self._pool.submit(lambda: self._hash.update(_bytes(part)))

    def wait(self) -> None:
        """Return when nothing is read any more."""
        if self._last:
            self._last.result()

    def digest(self) -> str:
        """SHA-256 of all parts together, as hexadecimal digits."""
        self.wait()
        return self._hash.hexdigest()


def sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's elements in row-major order, as hexadecimal digits."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data
