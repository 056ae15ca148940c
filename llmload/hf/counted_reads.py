"""How many bytes of each file of a checkpoint were read, whoever read them."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from llmload.checkpoint.patching import replaced
from llmload.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from llmload.checkpoint.contents import Checkpoint
    from llmload.checkpoint.header import TensorInfo


class CountedReads(AbstractContextManager["CountedReads"]):
    """Counts what transformers reads of a checkpoint's files, for the length of a ``with`` block.

    It stands before the two functions by which transformers opens weights, ``safe_open`` and
    ``torch.load``, and sees what they hand out: of safetensors each tensor or slice that is asked
    for, of a pickle all tensors in it that are not on the meta device. Both map the files, so the
    bytes that a process copies from them tell nothing. Another file is refused: only what was
    checked is opened.

    :param further: files of weights beside the checkpoint's that were checked too.
    """

    def __init__(self, checkpoint: Checkpoint, further: Iterable[Path] = ()) -> None:
        self._checkpoint = checkpoint
        self._paths = {os.path.realpath(file.path): file.path for file in checkpoint.files}
        self._further = {os.path.realpath(path) for path in further}
        self._bytes = dict.fromkeys((file.path for file in checkpoint.files), 0)
        self._reads = dict.fromkeys(self._bytes, 0)
        self._opened: set[Path] = set()
        self._counting = threading.Lock()  # transformers 5 reads in several threads
        self._stack = ExitStack()

    def __enter__(self) -> CountedReads:
        import safetensors
        import torch
        import transformers.modeling_utils  # noqa: F401 - has safe_open under a name of its own

        counted = partial(_CountedFile, self)
        with ExitStack() as stack:
            # Each module of transformers that reads weights has imported the function under its own
            # name (5.24: four of them), and one that is missed would open a file that nobody
            # checked.
            for name, module in list(sys.modules.copy().items()):
                found = vars(module).get("safe_open") if name.startswith("transformers.") else None
                if found is safetensors.safe_open:
                    stack.enter_context(replaced(module, {"safe_open": counted}))
            stack.enter_context(replaced(torch, {"load": partial(self._load, torch.load)}))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _load(self, load: Any, *args: Any, **options: Any) -> Any:
        import torch

        path = self.opened(args[0] if args else options.get("f"))
        content = load(*args, **options)
        if path is not None and isinstance(content, Mapping):
            for value in content.values():
                if isinstance(value, torch.Tensor) and not value.is_meta:
                    self.count(path, value.nbytes)
        return content

    def opened(self, file: Any) -> Path | None:
        """Note that a file is opened; returns its path in the checkpoint, None for a further."""
        if not isinstance(file, str | os.PathLike):
            return None
        real = os.path.realpath(file)
        path = self._paths.get(real)
        if path is not None:
            self._opened.add(path)
        elif real not in self._further:
            raise CheckpointError(
                "transformers was about to open this file of weights, which is not"
                " among those that were checked",
                fix="Keep the model's weights under their plain names, and load again.",
                where=str(file),
            )
        return path

    def count(self, path: Path | None, nbytes: int) -> None:
        """Note that bytes of a file were handed out in one piece; of None, nothing."""
        if path is not None:
            with self._counting:
                self._bytes[path] += nbytes
                self._reads[path] += nbytes > 0

    def count_tensors(self, tensors: Iterable[TensorInfo]) -> None:
        """Note that tensors of the checkpoint were read whole, by who mapped the files himself."""
        for info in tensors:
            self._opened.add(info.file)
            self.count(info.file, info.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes that were read of all files."""
        return sum(self._bytes.values())

    def facts(self) -> dict[str, Any]:
        """Return what was read, for the report: a file that was never seen open has None."""
        seen = {path: n if path in self._opened else None for path, n in self._bytes.items()}
        return {"files": self._checkpoint.reads_per_file(seen, self._reads)}


class _CountedFile:
    """An open file of safetensors that tells what is asked of it."""

    def __init__(self, counts: CountedReads, *args: Any, **options: Any) -> None:
        from safetensors import safe_open

        self._counts = counts
        self._path = counts.opened(args[0] if args else options.get("filename"))
        self._file: Any = safe_open(*args, **options)

    def __enter__(self) -> _CountedFile:
        self._file.__enter__()
        return self

    def __exit__(self, *exc: object) -> Any:
        return self._file.__exit__(*exc)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_tensor(self, name: str) -> Any:
        """A whole tensor, counted."""
        tensor = self._file.get_tensor(name)
        self._counts.count(self._path, tensor.nbytes)
        return tensor

    def get_slice(self, name: str) -> _CountedSlice:
        """A tensor of which nothing is read yet."""
        return _CountedSlice(self._counts, self._path, self._file.get_slice(name))


class _CountedSlice:
    """What safetensors hands out to be sliced; shape and dtype cost no read."""

    def __init__(self, counts: CountedReads, path: Path | None, outline: Any) -> None:
        self._counts = counts
        self._path = path
        self._slice = outline

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slice, name)

    def __getitem__(self, index: Any) -> Any:
        tensor = self._slice[index]
        self._counts.count(self._path, tensor.nbytes)
        return tensor
