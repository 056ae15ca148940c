"""Parameters of which this process holds a part: what DeepSpeed ZeRO-3 leaves of a tensor.

A partitioned parameter is empty where its values were, and keeps its shape and its part in
attributes of its own (``ds_shape``, ``ds_tensor``). Whoever looks at sizes or values of a model
asks here, and works for whole and partitioned models alike. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Span:
    """The elements of one parameter, laid out flat, that one rank holds.

    The parameter is cut into as many parts of one size as there are ranks. What the last parts lack
    is filled up with zeros.
    """

    start: int
    """First element."""
    stop: int
    """One past the last; the same as ``start`` where a rank holds padding alone."""
    size: int
    """Elements of the part with its padding, the same on all ranks."""

    @property
    def length(self) -> int:
        """Elements without padding."""
        return self.stop - self.start

    @classmethod
    def of(cls, elements: int, rank: int, ranks: int) -> Span:
        """Return the part of ``rank`` (from 0) in a parameter of so many elements."""
        size = -(-elements // ranks)
        return cls(min(rank * size, elements), min((rank + 1) * size, elements), size)


def is_partitioned(tensor: Any) -> bool:
    """Whether this process holds a part of the parameter."""
    return hasattr(tensor, "ds_tensor")


def shape(tensor: Any) -> tuple[int, ...]:
    """Return the shape of the whole."""
    return tuple(tensor.ds_shape if is_partitioned(tensor) else tensor.shape)


def elements(tensor: Any) -> int:
    """Return the number of elements of the whole."""
    return int(tensor.ds_numel if is_partitioned(tensor) else tensor.numel())


def values(tensor: Any) -> int:
    """Return the number of values of the whole: 4-bit codes are two to the byte, as PEFT counts."""
    packed = type(tensor).__name__ == "Params4bit" and tensor.bnb_quantized
    return elements(tensor) * (2 * tensor.element_size() if packed else 1)


def held(tensor: Any) -> tuple[torch.Tensor, int] | None:
    """Return the elements that this process has in memory, flat, and the first one's index.

    None where they are on a disk.
    """
    if not is_partitioned(tensor):
        return tensor.detach().reshape(-1), 0
    part = tensor.ds_tensor
    if part.status.name != "AVAILABLE":
        return None
    ranks = tensor.ds_numel_aligned // part.ds_numel
    span = Span.of(tensor.ds_numel, tensor.ds_process_group.rank(), ranks)
    return part[: span.length], span.start


@contextmanager
def whole(tensors: Iterable[Any]) -> Iterator[None]:
    """Make partitioned parameters ordinary ones for a block, whole on every rank.

    Afterwards they are partitioned anew, by rank 0's values: they may have another shape then. All
    ranks must come here alike.
    """
    found = {id(tensor): tensor for tensor in tensors if is_partitioned(tensor)}
    converts = {id(tensor): tensor.convert_to_zero_parameters for tensor in found.values()}
    for tensor in found.values():
        tensor.all_gather()
        tensor.data = tensor.data.clone()
        for name in [name for name in vars(tensor) if name.startswith("ds_")]:
            delattr(tensor, name)
    yield
    # Not where an error came through: the other ranks may not come here.
    for key, tensor in found.items():
        converts[key]([tensor])
