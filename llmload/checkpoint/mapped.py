"""The files of a checkpoint mapped into memory: tensors over their pages, nothing copied.

A mapping is private and copy-on-write, as transformers' own: writing to a tensor changes neither
the file nor any other load of it, and pages that were only read are shared by all processes. Where
a file system cannot map, or nothing shall be mapped, what is asked for is read into memory of our
own instead; so is what lies on no disk of this machine.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from llmload.checkpoint import free_memory, libc
from llmload.checkpoint.ahead import ReadAhead
from llmload.checkpoint.contents import Checkpoint, CheckpointFile, Fetch
from llmload.checkpoint.dtypes import torch_dtype
from llmload.checkpoint.folder import refuse
from llmload.checkpoint.open_files import OpenFiles, changed
from llmload.checkpoint.ranges import ranges
from llmload.checkpoint.reading import Reader, Reading, filled

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmload.checkpoint.accounting import Accounting
    from llmload.checkpoint.header import TensorInfo
    from llmload.checkpoint.placement import Placement
    from llmload.checkpoint.prefetching import Prefetching

# mmap names this flag from Python 3.13 on. Without it Linux refuses a private mapping larger than
# the machine's memory, though no page of it may ever be written.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

_PRIVATE = mmap.MAP_PRIVATE | NO_RESERVE
_READ_AND_WRITE = mmap.PROT_READ | mmap.PROT_WRITE

# Reading one page maps the 16 around it if they are in the page cache, over a tensor's ends.
_FAULT_AROUND = 16 * mmap.PAGESIZE


class MappedCheckpoint(AbstractContextManager["MappedCheckpoint"]):
    """Hands out a checkpoint's tensors and counts the bytes that were asked for, file by file.

    Files are mapped on first use, and few are open at a time; tensors that are kept keep their
    file's mapping alive, and no descriptor. A file that changed since its header was checked is
    refused each time a tensor is asked of it, because reading pages a file no longer has kills the
    process.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, may_stay: bool = True, reading: Reading | None = None
    ) -> None:
        """Map the files of a checkpoint.

        :param may_stay: let a model's weights lie over the files' pages when it is loaded.
        :param reading: how bytes come into memory; by default as pages are touched.
        """
        self.checkpoint = checkpoint
        self.may_stay = may_stay
        self.reading = reading or Reading()
        self.bytes_read = dict.fromkeys((file.path for file in checkpoint.files), 0)
        """Bytes of tensors handed out, by file; each tensor counts as often as it was asked for."""
        self.reads = dict.fromkeys(self.bytes_read, 0)
        """Pieces in which they were handed out, by file."""
        self._files = {file.path: file for file in checkpoint.files}
        self._open: dict[Path, _MappedFile | _FetchedFile] = {}
        self._descriptors = OpenFiles(checkpoint.files)
        self._reader = Reader(self.reading)
        self._ahead: ReadAhead | None = None
        self._prefetching: Prefetching | None = None

    def __exit__(self, *exc: object) -> None:
        if self._prefetching is not None:
            self._prefetching.__exit__()
        if self._ahead is not None:
            self._ahead.__exit__()
        self._reader.__exit__()
        self._open.clear()
        self._descriptors.__exit__()

    def read_ahead(self, model: nn.Module, accounting: Accounting, placement: Placement) -> None:
        """Begin to fetch in other threads what will be read, where that is the way to read, and
        what has to be fetched from afar, where it is kept.

        :param model: prepared by the placement.
        :param placement: one without ``extent`` does not say what it will read, and nothing is
            fetched.
        """
        keeping = {file.path for file in self.checkpoint.files if file.prefetch is not None}
        if self.reading.way != "ahead" and not keeping:
            return
        wanted = ranges(model, accounting, placement)
        if wanted is None:
            return
        if keeping:
            from llmload.checkpoint.prefetching import Prefetching  # needs locks of POSIX

            afar = (one for one in wanted if one.file in keeping)
            self._prefetching = Prefetching(self.checkpoint.files, afar)
        if self.reading.way == "ahead":
            here = (one for one in wanted if self._files[one.file].fetch is None)
            files, room = self.checkpoint.files, free_memory.for_pages()
            self._ahead = ReadAhead(files, here, self.reading, room=room)

    def finish(self) -> int:
        """Wait until what was to be fetched is in memory; returns the bytes that were not before.

        :raises CheckpointError: a file could not be read.
        """
        count = 0
        if self._prefetching is not None:
            count += self._prefetching.finish()
        if self._ahead is not None:
            self._ahead.finish()
            count += self._ahead.fetched
        return count

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """The tensor over the file's own pages; writable, and not counted as read yet.

        :raises CheckpointError: the file changed, or torch does not know the dtype.
        """
        self._await(info, 0, info.nbytes)
        return self._tensor(info)

    def _tensor(self, info: TensorInfo) -> torch.Tensor:
        import torch

        dtype = torch_dtype(info.dtype)
        if dtype is None:
            raise refuse(
                info.file, f"tensor {info.name!r} has dtype {info.dtype}, which torch lacks"
            )
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        file = self._file(info.file)
        if isinstance(file, _FetchedFile):
            tensor = torch.empty(info.shape, dtype=dtype)
            file.read(info.start, _memory(tensor))
            return tensor
        buffer = file.bytes()
        if info.start % dtype.itemsize:  # the format does not ask for alignment, torch does
            copy = bytearray(buffer[info.start : info.stop])
            return torch.frombuffer(copy, dtype=dtype).view(info.shape)
        return torch.frombuffer(buffer, dtype=dtype, count=info.numel, offset=info.start).view(
            info.shape
        )

    def unread(self, info: TensorInfo) -> torch.Tensor:
        """The same tensor for whoever tells :meth:`ask` of each part before it looks at it: nothing
        else of a file that is fetched is fetched, and memory that has no values takes no room.
        """
        import torch

        dtype = torch_dtype(info.dtype)
        if dtype is None or not isinstance(self._file(info.file), _FetchedFile):
            return self._tensor(info)
        return torch.empty(info.shape, dtype=dtype)

    def is_mapped(self, info: TensorInfo) -> bool:
        """Whether :meth:`read` is the way to copy a tensor: of a file that is fetched, what was
        asked for is in memory already."""
        return not isinstance(self._file(info.file), _FetchedFile)

    def address(self, info: TensorInfo) -> int:
        """Where in memory the tensor's first byte is mapped: proof that a tensor lies there.

        Of a file that is fetched no address that there is.
        """
        file = self._file(info.file)
        return -1 if isinstance(file, _FetchedFile) else file.address + info.start

    def ask(self, info: TensorInfo, part: torch.Tensor, *, later: bool = False) -> None:
        """Count a part of an :meth:`unread` tensor as read; what is fetched gets its values now.

        :param later: nobody looks at its values before :meth:`arrive`.
        """
        import torch

        first = int(part.storage_offset()) * part.itemsize
        file = self._file(info.file)
        if isinstance(file, _FetchedFile) and part.numel():
            with torch.no_grad():
                file.read(info.start + first, _memory(part))
        self.count(info, part.nbytes, first)
        if not later:
            self._await(info, first, part.nbytes)

    def arrive(self, info: TensorInfo, part: torch.Tensor) -> None:
        """Wait until a part of a tensor is in memory, where it is fetched ahead."""
        self._await(info, int(part.storage_offset()) * part.itemsize, part.nbytes)

    def _await(self, info: TensorInfo, first: int, nbytes: int) -> None:
        if self._ahead is not None and nbytes:
            start = info.start + first
            self._ahead.need(info.file, start, start + nbytes)

    def count(self, info: TensorInfo, nbytes: int, first: int = 0) -> None:
        """Note that ``nbytes`` of a tensor, from byte ``first`` on, are read in one piece."""
        self.bytes_read[info.file] += nbytes
        self.reads[info.file] += nbytes > 0

    def read(self, info: TensorInfo, first: int, out: torch.Tensor) -> None:
        """Fill ``out``, contiguous and on the CPU, with a tensor's bytes from ``first`` on.

        No page of the file is mapped, so none counts as this process's.

        :raises CheckpointError: the file ends before.
        """
        if out.numel():
            self._await(info, first, out.nbytes)
            self._file(info.file).read(info.start + first, _memory(out))
            self._used(info.file, info.start + first, info.start + first + out.nbytes)

    def part(self, info: TensorInfo, first: int, nbytes: int) -> torch.Tensor | None:
        """Bytes of a tensor over pages that are mapped for them alone, flat, as uint8.

        The pages leave the process with the last tensor over them, whatever becomes of the rest of
        the file. Nothing is read before its values are used; the kernel is told to fetch them.
        None where the process may have no more mappings (Linux, ``vm.max_map_count``), and of a
        file that is fetched.
        """
        file = self._file(info.file)
        if isinstance(file, _FetchedFile):
            return None
        return file.part(info.start + first, nbytes, fetch=self._ahead is None)

    def drop(self, info: TensorInfo, first: int = 0, nbytes: int | None = None) -> None:
        """Take the pages of a tensor, or of ``nbytes`` of it, out of this process; they stay in the
        page cache.

        Nothing is lost, also for tensors beside it, as long as none of them was written to.
        """
        start = info.start + first
        stop = info.stop if nbytes is None else start + nbytes
        self._file(info.file).drop(start, stop)
        self._used(info.file, start, stop)

    def _used(self, file: Path, start: int, stop: int) -> None:
        if self._ahead is not None:
            self._ahead.used(file, start, stop)

    def check(self) -> None:
        """Raise ``CheckpointError`` where a file that was read changed since it was opened."""
        for file in self._open.values():
            file.checked()

    def _file(self, path: Path) -> _MappedFile | _FetchedFile:
        if path not in self._open:
            file = self._files[path]
            if file.fetch is not None:
                self._open[path] = _FetchedFile(file.fetch)
            elif self.reading.way == "read":
                self._open[path] = _ReadFile(file, self._descriptors, self._reader)
            else:
                self._open[path] = self._mapped(file)
        return self._open[path]

    def _mapped(self, file: CheckpointFile) -> _MappedFile | _FetchedFile:
        try:
            return _MappedFile(file, self._descriptors)
        except OSError:  # a file system that cannot map: FUSE without it, some NFS
            return _ReadFile(file, self._descriptors, self._reader)


def _memory(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, to be written to."""
    import torch

    found: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return found


class _FetchedFile:
    """One of which nothing is mapped: each tensor of it has memory of its own."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch

    def checked(self) -> object:
        """Whoever fetches sees to it that the file is the one that was described."""

    def read(self, start: int, into: memoryview) -> None:
        self._fetch([(start, into)])

    def drop(self, start: int, stop: int) -> None:
        """Memory goes with the last tensor over it."""


class _ReadFile(_FetchedFile):
    """One on a disk of this machine."""

    def __init__(self, file: CheckpointFile, descriptors: OpenFiles, reader: Reader) -> None:
        super().__init__(self._read)
        self._path = file.path
        self._descriptors = descriptors
        self._reader = reader

    def checked(self) -> object:
        return self._descriptors.descriptor(self._path)

    def _read(self, spans: Iterable[tuple[int, memoryview]]) -> None:
        if not self._reader.read(self._descriptors.descriptor(self._path), spans):
            raise changed(self._path)


class _MappedFile:
    """One over whose pages tensors lie.

    :raises OSError: its file system cannot map it.
    """

    def __init__(self, file: CheckpointFile, descriptors: OpenFiles) -> None:
        self._path = file.path
        self._size = file.size
        self._descriptors = descriptors
        self._buffer = libc.mapped(self.checked(), 0, file.size, _READ_AND_WRITE, _PRIVATE)
        self.address = ctypes.addressof(self._buffer)

    def checked(self) -> int:
        """Return the descriptor; raise where the file is not the one whose header was checked."""
        return self._descriptors.descriptor(self._path)

    def bytes(self) -> memoryview:
        """The memory that the whole file is mapped to."""
        self.checked()
        return memoryview(self._buffer).cast("B")

    def read(self, start: int, into: memoryview) -> None:
        if not filled(self.checked(), start, into):
            raise changed(self._path)

    def part(self, start: int, nbytes: int, *, fetch: bool) -> torch.Tensor | None:
        import torch

        descriptor = self.checked()
        offset = start // mmap.PAGESIZE * mmap.PAGESIZE
        length = start + nbytes - offset
        try:
            memory = libc.mapped(descriptor, offset, length, _READ_AND_WRITE, _PRIVATE)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                return None
            raise
        if fetch:
            # A part of its own is about to be used, and a rank that faults in page by page waits
            # for each.
            libc.libc().madvise(ctypes.addressof(memory), length, mmap.MADV_WILLNEED)
        return torch.frombuffer(memory, dtype=torch.uint8, offset=start - offset, count=nbytes)

    def drop(self, start: int, stop: int) -> None:
        start = max(0, start - _FAULT_AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
        stop = min(stop + _FAULT_AROUND, self._size)
        libc.libc().madvise(self.address + start, stop - start, mmap.MADV_DONTNEED)
