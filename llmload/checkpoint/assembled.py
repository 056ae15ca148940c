"""Values that transformers makes of several tensors of a checkpoint, read without being made.

Merged experts are a stack of matrices, or a concatenation of such stacks. transformers makes them
with ``torch.stack`` and ``torch.cat`` of what it asked for. It is given stand-ins, which write down
what is joined; every other operation is done on the tensors themselves, at once. Whoever needs a
part of the result, as a rank under ZeRO-3 does, reads the tensors that this part lies in.

Imported lazily, by functions: this module needs torch.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from llmload.checkpoint.header import TensorInfo

_JOINING = (torch.ops.aten.stack.default, torch.ops.aten.cat.default)


class Joined:
    """Tensors laid side by side along one dimension.

    :param parts: contiguous tensors, or joined ones.
    :param dim: of the result; what is before it is gone through row by row.
    :param make: joins the tensors themselves.
    """

    def __init__(
        self,
        parts: Sequence[torch.Tensor | Joined],
        like: torch.Tensor,
        dim: int,
        make: Callable[[list[torch.Tensor]], torch.Tensor],
    ) -> None:
        self.parts = parts
        self.shape = like.shape
        self.dtype = like.dtype
        self._make = make
        rows = math.prod(like.shape[:dim])
        self._ends = list(accumulate(part.shape.numel() // rows for part in parts))

    def tensor(self) -> torch.Tensor:
        """Make the value, whole."""
        return self._make([_made(part) for part in self.parts])

    def leaves(self) -> Iterator[torch.Tensor]:
        """Yield the tensors that it is made of."""
        for part in self.parts:
            if isinstance(part, Joined):
                yield from part.leaves()
            else:
                yield part

    def pieces(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Yield the elements from an index to another of the value laid out flat, in order.

        Each piece is one-dimensional and a view of one of the tensors.
        """
        while start < stop:
            # The ends are counted within a row of what is before `dim`. Along the first dimension
            # there is one row, the whole; along the second, each row has a piece of every part.
            row, column = divmod(start, self._ends[-1])
            number = bisect_right(self._ends, column)
            begin = self._ends[number - 1] if number else 0
            length = min(self._ends[number] - column, stop - start)
            first = row * (self._ends[number] - begin) + column - begin
            part = self.parts[number]
            if isinstance(part, Joined):
                yield from part.pieces(first, first + length)
            else:
                yield part.view(-1)[first : first + length]
            start += length


def _made(part: torch.Tensor | Joined) -> torch.Tensor:
    return part.tensor() if isinstance(part, Joined) else part


class StandIn(torch.Tensor):
    """Stands for a tensor while transformers converts it: what is joined is not made.

    It has shape, dtype and device of what it stands for, and no values of its own.
    """

    behind: torch.Tensor | Joined

    # A wrapper subclass that is only asked below autograd, by the operations themselves.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, behind: torch.Tensor | Joined, device: torch.device) -> StandIn:  # noqa: D102
        made: StandIn = torch.Tensor._make_wrapper_subclass(
            cls, behind.shape, dtype=behind.dtype, device=device
        )
        made.behind = behind
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _JOINING and not kwargs:
            joined = _joined(func, *args)
            if joined is not None:
                return cls(joined, args[0][0].device)
        # Anything but joining (a permutation, a cast, arithmetic) needs the values: they are made
        # now, and the result is an ordinary tensor, which `Assembled.of` then calls computed.
        args, kwargs = tree_map_only(StandIn, lambda s: _made(s.behind), (args, kwargs or {}))
        return func(*args, **kwargs)


def _joined(func: Any, tensors: Sequence[torch.Tensor], dim: int = 0) -> Joined | None:
    """Return what ``func`` would make; None where it does more than to lay tensors side by side."""
    parts = [t.behind if isinstance(t, StandIn) else t for t in tensors]
    plain = all(isinstance(part, Joined) or part.is_contiguous() for part in parts)
    alike = len({(t.dtype, t.device, t.dim()) for t in tensors}) == 1
    if not plain or not alike or not all(t.numel() for t in tensors):
        return None
    # Raises what the operation raises for shapes that do not go together.
    like = func([torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors], dim)
    return Joined(parts, like, dim % like.dim(), lambda made: func(made, dim))


class Assembled:
    """A converted value of which every element lies in some tensor of the file.

    :param value: contiguous tensors, or such joined.
    :param places: storage of a tensor -> what it is in the file, from its first byte on.
    """

    def __init__(self, value: torch.Tensor | Joined, places: dict[int, TensorInfo]) -> None:
        self._value = value
        self._places = places
        self.shape = value.shape
        self.dtype = value.dtype

    @classmethod
    def of(
        cls, value: torch.Tensor, taken: Iterable[tuple[TensorInfo, torch.Tensor]]
    ) -> Assembled | None:
        """Return ``value`` as it is assembled of tensors that were taken; None if it is computed.

        :param taken: tensors of the file, or stand-ins for them.
        """
        found = value.behind if isinstance(value, StandIn) else value
        leaves = list(found.leaves()) if isinstance(found, Joined) else [found]
        places = {storage_of(tensor): info for info, tensor in taken}
        if all(leaf.is_contiguous() and storage_of(leaf) in places for leaf in leaves):
            return cls(found, places)
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of the value, as stored."""
        return self.shape.numel() * self.dtype.itemsize

    def origin(self, piece: torch.Tensor) -> TensorInfo:
        """Return the tensor of the file that a piece is a view of."""
        return self._places[storage_of(piece)]

    def pieces(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Yield the elements from an index to another, laid out flat, as views of the file."""
        if isinstance(self._value, Joined):
            yield from self._value.pieces(start, stop)
        elif start < stop:
            yield self._value.view(-1)[start:stop]


def itself(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a stand-in stands for, made if it must be; other tensors as they are."""
    return _made(tensor.behind) if isinstance(tensor, StandIn) else tensor


def storage_of(tensor: torch.Tensor) -> int:
    """Return what all views of one tensor have in common, on the meta device too."""
    return int(itself(tensor).untyped_storage()._cdata)
