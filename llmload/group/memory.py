"""Weights that several models have in common, cast once into a memory file.

Each model maps the file privately, copy-on-write, as it maps the checkpoint's own files: a page is
held once for as long as nobody writes to it, and a write reaches no other model. The writer's own
mapping ends with the pool, which then seals the file: from there on nothing can change it. Linux
only, and on the CPU.
"""

from __future__ import annotations

import math
import mmap
import os
from collections import Counter
from collections.abc import Collection, Hashable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

from llmload.checkpoint.mapped import NO_RESERVE
from llmload.checkpoint.placement import Plain

if TYPE_CHECKING:
    from types import TracebackType

    import torch
    from transformers import PreTrainedModel

    from llmload.checkpoint.placement import Source, Target

_WIDEST = 8
"""Bytes of an element of float64."""


def unavailable() -> str | None:
    """Say why this system has no memory files, or None."""
    return None if hasattr(os, "memfd_create") else "this system has no memory files (memfd)"


def room_for(elements: Iterable[int]) -> int:
    """Return the bytes that tensors of so many elements take at most, in the widest dtype."""
    return sum(_pages(count * _WIDEST) for count in elements)


def _pages(size: int) -> int:
    """Round up to whole pages: every tensor begins on one of its own."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


class Pool(AbstractContextManager["Pool"]):
    """The memory file of models that are loaded one after the other, within a ``with`` block.

    :param capacity: bytes that the file can hold; it takes only what is written.
    """

    def __init__(self, capacity: int) -> None:
        self._places: dict[Hashable, tuple[int, str]] = {}
        self._end = 0
        self._capacity = capacity
        # Sealing must be allowed from the start; the name shows in /proc/PID/maps.
        self._file = os.memfd_create("llmload-shared", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._file, capacity)
        self._writing = mmap.mmap(self._file, capacity, flags=mmap.MAP_SHARED | NO_RESERVE)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:  # whose traceback may hold a tensor over the writer's mapping
            os.close(self._file)
            return
        import fcntl

        self._writing.close()
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, seals)
        os.close(self._file)

    def mapping(self) -> mmap.mmap:
        """Map the whole file privately, for one model."""
        # Private and writable: to torch the weights are ordinary ones, and a training step works.
        return mmap.mmap(
            self._file,
            self._capacity,
            flags=mmap.MAP_PRIVATE | NO_RESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )

    def find(self, key: Hashable) -> tuple[int, str] | None:
        """Return where in the file a tensor lies, and who wrote it; None if nobody has."""
        return self._places.get(key)

    def room(self, key: Hashable, layout: Layout, writer: str) -> tuple[int, torch.Tensor]:
        """Return where a new tensor will lie in the file, and that tensor, to be filled."""
        start, self._end = self._end, self._end + _pages(layout.size)
        self._places[key] = start, writer
        return start, layout.over(self._writing, start)

    def written(self) -> None:
        """Let go of the pages that the last model filled: they are in the file."""
        self._writing.madvise(mmap.MADV_DONTNEED)


class Layout(NamedTuple):
    """How a tensor of one or more elements lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        """Return the layout of a tensor whose elements fill their memory."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def over(self, buffer: mmap.mmap, start: int) -> torch.Tensor:
        """Return the tensor that lies so at ``start`` in a mapping."""
        import torch

        count = math.prod(self.shape)
        flat = torch.frombuffer(buffer, dtype=self.dtype, count=count, offset=start)
        return flat.as_strided(self.shape, self.stride)


class Shared(Plain):
    """Where one model of several stores its weights.

    Only on the CPU, and only what is not on the checkpoint's own pages anyway, which are shared
    already.

    :param model: what the model is called among those of the pool.
    :param names: the parameters to share, by their names in this model.
    :param kind: tells values that were converted (merged, split) apart: what the conversion
        depends on beside the name.
    """

    replaceable = True

    def __init__(self, pool: Pool, model: str, names: Collection[str], kind: Hashable) -> None:
        self._pool = pool
        self._model = model
        self._names = names
        self._kind = kind
        self._mapping = pool.mapping()
        self._found: dict[int, tuple[str, int]] = {}
        self.found: Counter[str] = Counter()
        """Bytes of the finished model that another had cast before, by its name; what a tie left
        behind is not among them."""

    def place(self, target: Target, source: Source) -> torch.Tensor:
        """Return the value over the memory file's pages, read and cast only by the first."""
        # With the dtype of the file it lies on the file's own pages, which is less memory than one
        # cast.
        as_stored = source.origin is not None and source.dtype == target.dtype
        wanted = target.name in self._names and target.device.type == "cpu"
        if as_stored or not wanted or not source.shape.numel():
            return super().place(target, source)
        layout = Layout.of(source.empty(target.dtype))
        origin = source.origin
        # A converted value has no one place: its name and what decides on the conversion tell it.
        value = (origin.file, origin.start, origin.dtype) if origin else (self._kind, target.name)
        found = self._pool.find((value, layout))
        if found is None:
            start, out = self._pool.room((value, layout), layout, self._model)
            source.fill(out)
        else:
            start, writer = found
        # The writer too maps it privately: what was filled through the common mapping shows
        # through, and its own later writes do not.
        shared = layout.over(self._mapping, start)
        if found is not None:
            self._found[shared.data_ptr()] = writer, layout.size
        return shared

    def finish(self, model: PreTrainedModel) -> None:
        """Let go of what was filled, and count what was found."""
        self._pool.written()
        for parameter in model.parameters():
            if parameter.data_ptr() in self._found:
                writer, size = self._found[parameter.data_ptr()]
                self.found[writer] += size
