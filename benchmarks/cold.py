"""Loads of files that are not in memory: from a disk, and from a file system that is some way off.

Every side ends when each page of the weights was touched once, so that none gains by leaving the
reading to the first step. The file system that is some way off is ``slowfs.c`` of this package,
which answers each request after two milliseconds; it needs root, gcc, pkg-config and libfuse3-dev.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from . import zero3
from .case import Case, Mark
from .loading import from_pretrained_as, llmload_as, weights_mib

TITLE = "Files that are not in memory"

MILLISECONDS = 2.0
_COUNTS = ".requests"
_GIB = 2**30
_PIECE = {4: 2**22, 16: 2**20}
"""Bytes that each of so many threads reads at a time."""


# --- what is read ---------------------------------------------------------------------------------


@contextmanager
def evicted(folder: Path) -> Iterator[Path]:
    """Have the kernel forget the folder's files."""
    os.sync()
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    yield folder


@contextmanager
def far_off(folder: Path) -> Iterator[Path]:
    """Mount the folder some way off, with nothing of it in memory; below it, everything is."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.read(2**24):
                pass
    program = _compiled(folder.parent)
    mount = Path(tempfile.mkdtemp(prefix="llmload-far-"))
    subprocess.run([program, folder, mount, str(MILLISECONDS)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["fusermount3", "-u", mount], check=True)
        mount.rmdir()


def _compiled(place: Path) -> Path:
    source, program = Path(__file__).with_name("slowfs.c"), place / "slowfs"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        flags = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "fuse3"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        subprocess.run(["gcc", "-O2", source, *shlex.split(flags), "-o", program], check=True)
    return program


# --- who reads ------------------------------------------------------------------------------------


def touched(load: Callable[[Path], Any], folder: Path) -> Iterator[Mark]:
    """Load, and touch each page of the weights that this process has."""
    began = time.perf_counter()
    loaded = load(folder)
    _touch(loaded)
    yield "load and touch", _figures(folder, weights_mib(folder), time.perf_counter() - began)
    del loaded


def _touch(loaded: Any) -> None:
    import torch

    import llmload

    # Of transformers' models, `model` is one without its head.
    model = loaded.model if isinstance(loaded, llmload.LoadResult) else loaded
    tensors: Iterable[Any] = model.values() if isinstance(model, dict) else model.parameters()
    with torch.no_grad():
        for tensor in tensors:
            held = getattr(tensor, "ds_tensor", tensor)
            held.reshape(-1)[:: 4096 // held.element_size()].float().sum()


def _figures(folder: Path, mib: float, seconds: float) -> dict[str, float]:
    figures = {"GB/s": mib * 2**20 / 1e9 / seconds}
    with suppress(OSError):
        figures["requests"] = float((folder / _COUNTS).read_text().split()[0])
    return figures


def safetensors(folder: Path, *, backend: str) -> dict[str, Any]:
    """Read every file with safetensors' own reader."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file, backend=backend)
    return found


def torch_reader(folder: Path) -> dict[str, Any]:
    """Read with PyTorch's distributed checkpoint reader of safetensors."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    from llmload.checkpoint import Checkpoint
    from llmload.checkpoint.dtypes import torch_dtype

    tensors = Checkpoint.open(folder).tensors.values()
    state = {info.name: torch.empty(info.shape, dtype=torch_dtype(info.dtype)) for info in tensors}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return state


def fastsafetensors(folder: Path) -> dict[str, Any]:
    """Read every file with fastsafetensors, which copies files whole, to the CPU's memory here."""
    import torch
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cpu"), nogds=True)
    loader.add_filenames({0: [str(file) for file in sorted(folder.glob("*.safetensors"))]})
    buffers = loader.copy_files_to_device()
    return _Over(buffers, {name: buffers.get_tensor(name) for name in buffers.key_to_rank_lidx})


class _Over(dict[str, Any]):
    """Tensors, and the memory that they lie in."""

    def __init__(self, buffers: Any, tensors: dict[str, Any]) -> None:
        super().__init__(tensors)
        self._buffers = buffers


def reads(folder: Path, *, threads: int) -> None:
    """Read all bytes and keep none: what no load can be faster than."""
    from concurrent.futures import ThreadPoolExecutor

    piece = _PIECE.get(threads, 2**22)

    def read(place: tuple[int, int]) -> None:
        descriptor, start = place
        os.preadv(descriptor, [bytearray(piece)], start)

    opened = [os.open(file, os.O_RDONLY) for file in sorted(folder.glob("*.safetensors"))]
    with ThreadPoolExecutor(threads) as pool:
        for descriptor in opened:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            starts = range(0, os.fstat(descriptor).st_size, piece)
            list(pool.map(read, zip(repeat(descriptor), starts, strict=False)))
    for descriptor in opened:
        os.close(descriptor)


def read_alone(folder: Path, *, threads: int) -> Iterator[Mark]:
    """The same as a side."""
    began = time.perf_counter()
    reads(folder, threads=threads)
    yield "load and touch", _figures(folder, weights_mib(folder), time.perf_counter() - began)


def _sides(limit: int) -> dict[str, Any]:
    return {
        "llmload": partial(touched, llmload_as("bfloat16")),
        "from_pretrained": partial(touched, from_pretrained_as("bfloat16")),
        "safetensors, mapped": partial(touched, partial(safetensors, backend="mmap")),
        "safetensors, pread": partial(touched, partial(safetensors, backend="pread")),
        "fastsafetensors": partial(touched, fastsafetensors),
        "HuggingFaceStorageReader": partial(touched, torch_reader),
        "one reading loop": partial(read_alone, threads=1),
        f"{limit} reading threads": partial(read_alone, threads=limit),
    }


CASES = {
    "disk": Case(
        title="from a disk",
        sides=_sides(4),
        target="at least 1.3x faster than from_pretrained, 0.9 of what 4 threads read",
        final=weights_mib,
        sizes=("1.1B", "3B"),
        around=evicted,
    ),
    "far-off": Case(
        title=f"from a file system with {MILLISECONDS:g} ms per request",
        sides=_sides(16),
        target="at least 2.5x faster than from_pretrained",
        final=weights_mib,
        sizes=("1.1B",),
        around=far_off,
    ),
    "far-off-zero3": Case(
        title=f"the same, 2 ranks under ZeRO-3, {MILLISECONDS:g} ms per request",
        sides={
            "llmload": partial(touched, zero3.our_load),
            "from_pretrained": partial(touched, zero3.their_load),
        },
        target="at least 2.5x faster than from_pretrained",
        final=partial(zero3.part_mib, ranks=2),
        sizes=("1.1B",),
        imports=zero3.IMPORTS,
        prepare=zero3.join,
        ranks=2,
        around=far_off,
    ),
}
