"""Which tensors still hold uninitialised memory, or something computed from it.

``torch.empty`` gives whatever the memory held before. :class:`Tracker` follows every operation from
there: a tensor is without values until all of it is written from what has values.

Imported lazily, by functions: this module needs torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_EMPTY = (
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::empty_permuted",
    "aten::new_empty",
    "aten::new_empty_strided",
)
_OVERWRITES = (
    "aten::copy_",
    "aten::fill_",
    "aten::zero_",
    "aten::normal_",
    "aten::uniform_",
    "aten::random_",
    "aten::bernoulli_",
    "aten::exponential_",
    "aten::geometric_",
    "aten::cauchy_",
    "aten::log_normal_",
    "aten::eye_",
    "aten::set_",
)
"""Operations in place whose result does not depend on what the tensor held before."""
_NO_VALUES = ("aten::detach", "aten::alias", "aten::is_same_size", "aten::sym_size")


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows uninitialised memory through all operations of a ``with`` block.

    It may be entered several times.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._without: dict[int, _Memory] = {}
        self._all_lost = False

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take further tensors for ones that hold no values yet."""
        self._without.update((_storage(tensor), _Memory(tensor)) for tensor in tensors)

    def without_values(self) -> list[torch.Tensor]:
        """Return one tensor for each storage of which a part is without values."""
        return [memory.tensor for memory in self._without.values()]

    def holds_values(self, tensor: torch.Tensor) -> bool:
        """Say whether every element was written, and from nothing but what was written itself."""
        memory = self._without.get(_storage(tensor))
        return memory is None or memory.is_written(tensor)

    def forget(self, tensor: torch.Tensor) -> None:
        """Hold on to a tensor no longer that nobody will ask for."""
        self._without.pop(_storage(tensor), None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        # Memory of the allocator: without values until it is written. Of no elements there is
        # nothing.
        if name in _EMPTY:
            result = func(*args, **kwargs)
            if not result.is_meta and result.numel():
                self.add([result])
            return result
        # The ordinary case, on every operation: as short as can be.
        if not self._without:
            return func(*args, **kwargs)
        written, read = _split(func, args, kwargs)
        # What an operation in place finds goes into its result, as with `add_`.
        if not (name in _OVERWRITES or "out" in func._schema.overload_name):
            read += written
        reads = func._schema.is_mutable or not (func.is_view or name in _NO_VALUES)
        lost = reads and not all(map(self.holds_values, read))
        result = func(*args, **kwargs)
        if func.is_view or name in _NO_VALUES:
            return result
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if lost and not results and not written:
            self._all_lost = True  # a number of Python's: nobody knows what is computed with it
        # Uninitialised memory spreads: a result of what has no values has none itself.
        for tensor in [*written, *results]:
            if not tensor.is_meta:
                self._note(tensor, written=not (lost or self._all_lost))
        return result

    def _note(self, tensor: torch.Tensor, *, written: bool) -> None:
        key = _storage(tensor)
        memory = self._without.get(key)
        if memory is None:
            if written:
                return
            memory = self._without[key] = _Memory(tensor)
        if memory.set(tensor, written):
            del self._without[key]


class _Memory:
    """Which elements of one storage have values.

    :param tensor: looks at it, and keeps it alive.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._written: torch.Tensor | None = None  # none is, as long as there is no such tensor

    def is_written(self, tensor: torch.Tensor) -> bool:
        """Say whether all elements that a tensor looks at have values."""
        found = self._of(tensor)
        return found is not None and bool(found.all())

    def set(self, tensor: torch.Tensor, written: bool) -> bool:
        """Note that a tensor was written, with values or without; says whether now all have."""
        nbytes = tensor.untyped_storage().nbytes()
        # The whole storage at once: nothing has to be kept of single elements.
        if tensor.numel() * tensor.element_size() >= nbytes and tensor.is_contiguous():
            self._written = None
            return written
        if self._written is None:
            if not written:
                return False
            self._written = torch.zeros(nbytes // self.tensor.element_size(), dtype=torch.bool)
        part = self._of(tensor)
        if part is not None:
            part.fill_(written)
        return bool(self._written.all())

    def _of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        if self._written is None or tensor.element_size() != self.tensor.element_size():
            return None
        return self._written.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _split(func: Any, args: Any, kwargs: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the tensors that an operation writes, and those whose values it reads."""
    written: list[torch.Tensor] = []
    read: list[torch.Tensor] = []
    given = dict(zip(_written(func), args, strict=False)) | kwargs
    for name, value in given.items():
        for leaf in tree_leaves(value):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                (written if _written(func).get(name) else read).append(leaf)
    return written, read


@functools.cache
def _written(func: Any) -> dict[str, bool]:
    """Return the operation's arguments, in order, and whether it writes them."""
    return {
        argument.name: argument.alias_info is not None and argument.alias_info.is_write
        for argument in func._schema.arguments
    }


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
