"""The files of a checkpoint mapped into memory: tensors over their pages, nothing copied.

A mapping is private and copy-on-write, as transformers' own: writing to a tensor changes neither
the file nor any other load of it, and pages that were only read are shared by all processes. Where
a file system cannot map, each tensor is read once into memory of our own instead; so is what lies
on no disk of this machine, and of that no more than is asked for.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from llmload.checkpoint import libc
from llmload.checkpoint.contents import Checkpoint, CheckpointFile, Fetch
from llmload.checkpoint.dtypes import torch_dtype
from llmload.checkpoint.folder import refuse
from llmload.checkpoint.open_files import OpenFiles, changed

if TYPE_CHECKING:
    import torch

    from llmload.checkpoint.header import TensorInfo

# mmap names this flag from Python 3.13 on. Without it Linux refuses a private mapping larger than
# the machine's memory, though no page of it may ever be written.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

_PRIVATE = mmap.MAP_PRIVATE | NO_RESERVE
_OWN = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
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

    def __init__(self, checkpoint: Checkpoint, *, may_stay: bool = True) -> None:
        """Map the files of a checkpoint.

        :param may_stay: let a model's weights lie over the files' pages when it is loaded.
        """
        self.checkpoint = checkpoint
        self.may_stay = may_stay
        self.bytes_read = dict.fromkeys((file.path for file in checkpoint.files), 0)
        """Bytes of tensors handed out, by file; each tensor counts as often as it was asked for."""
        self.reads = dict.fromkeys(self.bytes_read, 0)
        """Pieces in which they were handed out, by file."""
        self._files = {file.path: file for file in checkpoint.files}
        self._open: dict[Path, _MappedFile | _FetchedFile] = {}
        self._descriptors = OpenFiles(checkpoint.files)

    def __exit__(self, *exc: object) -> None:
        self._open.clear()
        self._descriptors.__exit__()

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """The tensor over the file's own pages; writable, and not counted as read yet.

        :raises CheckpointError: the file changed, or torch does not know the dtype.
        """
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
        buffer = file.bytes(info.start, info.stop)
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
            return self.tensor(info)
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

    def ask(self, info: TensorInfo, part: torch.Tensor) -> None:
        """Count a part of an :meth:`unread` tensor as read; what is fetched gets its values now."""
        import torch

        first = int(part.storage_offset()) * part.itemsize
        file = self._file(info.file)
        if isinstance(file, _FetchedFile) and part.numel():
            with torch.no_grad():
                file.read(info.start + first, _memory(part))
        self.count(info, part.nbytes, first)

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
            self._file(info.file).read(info.start + first, _memory(out))

    def part(self, info: TensorInfo, first: int, nbytes: int) -> torch.Tensor | None:
        """Bytes of a tensor over pages that are mapped for them alone, flat, as uint8.

        The pages leave the process with the last tensor over them, whatever becomes of the rest of
        the file. Nothing is read before its values are used; the kernel is told to fetch them.
        None where the process may have no more mappings (Linux, ``vm.max_map_count``), and of a
        file that is fetched.
        """
        return self._file(info.file).part(info.start + first, nbytes)

    def drop(self, info: TensorInfo, first: int = 0, nbytes: int | None = None) -> None:
        """Take the pages of a tensor, or of ``nbytes`` of it, out of this process; they stay in the
        page cache.

        Nothing is lost, also for tensors beside it, as long as none of them was written to.
        """
        start = info.start + first
        stop = info.stop if nbytes is None else start + nbytes
        self._file(info.file).drop(start, stop)

    def check(self) -> None:
        """Raise ``CheckpointError`` where a file that was read changed since it was opened."""
        for file in self._open.values():
            file.checked()

    def _file(self, path: Path) -> _MappedFile | _FetchedFile:
        if path not in self._open:
            file = self._files[path]
            self._open[path] = (
                _MappedFile(file, self._descriptors)
                if file.fetch is None
                else _FetchedFile(file.fetch)
            )
        return self._open[path]


def _memory(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, to be written to."""
    import torch

    found: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return found


class _FetchedFile:
    """One that lies on no disk of this machine: each tensor of it has memory of its own."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch

    def checked(self) -> None:
        """Whoever fetches sees to it that the file is the one that was described."""

    def read(self, start: int, into: memoryview) -> None:
        self._fetch([(start, into)])

    def part(self, start: int, nbytes: int) -> None:
        return None

    def drop(self, start: int, stop: int) -> None:
        """Memory goes with the last tensor over it."""


class _MappedFile:
    def __init__(self, file: CheckpointFile, descriptors: OpenFiles) -> None:
        self._path = file.path
        self._size = file.size
        self._descriptors = descriptors
        # None where the file is mapped; else what has been read of it.
        self._copied: set[tuple[int, int]] | None = None
        descriptor = self.checked()
        try:
            self._buffer = libc.mapped(descriptor, 0, file.size, _READ_AND_WRITE, _PRIVATE)
        except OSError:
            # A file system that cannot map (FUSE without it, some NFS): memory of our own, filled
            # as tensors are asked for.
            self._copied = set()
            self._buffer = libc.mapped(-1, 0, file.size, _READ_AND_WRITE, _OWN)
        self.address = ctypes.addressof(self._buffer)

    def checked(self) -> int:
        """Return the descriptor; raise where the file is not the one whose header was checked."""
        return self._descriptors.descriptor(self._path)

    def bytes(self, start: int, stop: int) -> memoryview:
        """The memory that holds the whole file, in which these bytes can be used."""
        self.checked()
        whole = memoryview(self._buffer).cast("B")
        if self._copied is not None and (start, stop) not in self._copied:
            self.read(start, whole[start:stop])
            self._copied.add((start, stop))
        return whole

    def read(self, start: int, into: memoryview) -> None:
        while into:
            count = os.preadv(self.checked(), [into], start)
            if not count:
                raise changed(self._path)
            start, into = start + count, into[count:]

    def part(self, start: int, nbytes: int) -> torch.Tensor | None:
        import torch

        descriptor = self.checked()
        if self._copied is not None:
            values = torch.empty(nbytes, dtype=torch.uint8)
            self.read(start, values.numpy().data)
            return values
        offset = start // mmap.PAGESIZE * mmap.PAGESIZE
        length = start + nbytes - offset
        try:
            memory = libc.mapped(descriptor, offset, length, _READ_AND_WRITE, _PRIVATE)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                return None
            raise
        # A part of its own is about to be used, and a rank that faults in page by page waits for
        # each.
        libc.libc().madvise(ctypes.addressof(memory), length, mmap.MADV_WILLNEED)
        return torch.frombuffer(memory, dtype=torch.uint8, offset=start - offset, count=nbytes)

    def drop(self, start: int, stop: int) -> None:
        if self._copied is not None:
            return  # there is no file beneath to fetch it from again
        start = max(0, start - _FAULT_AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
        stop = min(stop + _FAULT_AROUND, self._size)
        libc.libc().madvise(self.address + start, stop - start, mmap.MADV_DONTNEED)
