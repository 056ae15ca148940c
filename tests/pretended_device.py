"""An accelerator that is not there: PyTorch's Python backend, with memory and a bus of its own.

Its tensors are ordinary ones behind tensors of device ``npu``. A copy to it that is not
waited for is written down in the stream that is current, and made no sooner than it must be: when
the bus has got so far, or when somebody waits for it or does something else in the same stream. So
a buffer that is filled anew too soon, or a value that is looked at in another stream, shows in the
values. The bus moves ``Bus.rate`` bytes for each byte that is put on it.

What it does not show: how long anything takes, and what another device computes.

Once it is imported it is there until the process ends. It needs a torch that has such a backend.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

from llmload.checkpoint import staging

NAME = "npu"
_POISON = 0xA5
"""What is in each byte of its memory before something is written there."""


class Bus:
    """What is on its way, and what there was of it at most."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.reset()

    def reset(self, rate: float = 0.0) -> None:
        """Begin to count anew, with so many bytes moved for each that is put on it."""
        self.rate = rate
        self.pinned: list[torch.Tensor] = []
        self.most_pinned = 0
        self.copies = 0
        self.nbytes = 0
        """Of all copies."""
        self.most_under_way = 0
        self.waits = 0
        """How often somebody waited for a copy that had not been made."""

    def is_pinned(self, memory: torch.Tensor) -> bool:
        place = memory.data_ptr()
        return any(p.data_ptr() <= place < p.data_ptr() + p.nbytes for p in self.pinned)


BUS = Bus()


class Stream:
    """Copies in their order, each of which is made late."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, int, Callable[[], Any]]] = deque()
        self.begun = 0
        self.done = 0
        self._credit = 0.0

    def add(self, nbytes: int, copy: Callable[[], Any]) -> None:
        with BUS.lock:
            self.begun += 1
            self._waiting.append((self.begun, nbytes, copy))
            BUS.copies += nbytes > 0
            BUS.nbytes += nbytes
            BUS.most_under_way = max(BUS.most_under_way, self.under_way)
            self._credit += BUS.rate * nbytes
            while self._waiting and self._waiting[0][1] <= self._credit:
                self._credit -= self._waiting[0][1]
                self._make_next()
            if not self._waiting:
                self._credit = 0.0  # a bus with nothing on it saves nothing up

    @property
    def under_way(self) -> int:
        """How many copies have not been made."""
        with BUS.lock:
            return sum(nbytes > 0 for _, nbytes, _ in self._waiting)

    def make(self, number: int) -> None:
        """Make all copies up to one."""
        with BUS.lock:
            if number > self.done:
                BUS.waits += 1
            while self.done < number:
                self._make_next()

    def _make_next(self) -> None:
        number, _, copy = self._waiting.popleft()
        copy()
        self.done = number

    def synchronize(self) -> None:
        self.make(self.begun)


class Event:
    """A place in a stream."""

    def record(self, stream: Stream) -> None:
        self._stream, self._number = stream, stream.begun

    def query(self) -> bool:
        return self._stream.done >= self._number

    def synchronize(self) -> None:
        self._stream.make(self._number)


_DEFAULT = Stream()
_CURRENT = threading.local()


class _Module(_DummyBackendModule):
    """What torch has of it: ``torch.npu``."""

    Stream = Stream
    Event = Event

    def current_stream(self, device: Any = None) -> Stream:
        found: Stream = getattr(_CURRENT, "stream", _DEFAULT)
        return found

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current_stream()
        _CURRENT.stream = stream
        try:
            yield
        finally:
            _CURRENT.stream = before


_MODULE = _Module()
_BEHIND: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
"""Storage of a tensor -> the ordinary tensor behind it, and itself, so that it is not reused."""


def behind(tensor: torch.Tensor) -> torch.Tensor:
    """Return the ordinary tensor with the values, as they are in memory just now."""
    _, found = _BEHIND[tensor.untyped_storage()._cdata]
    if (found.shape, found.dtype, tensor.storage_offset()) == (tensor.shape, tensor.dtype, 0):
        return found
    # torch makes some views by itself.
    return _viewed(tensor, tensor.shape, tensor.stride(), tensor.storage_offset())


def _viewed(tensor: torch.Tensor, shape: Any, stride: Any, start: Any) -> torch.Tensor:
    flat = _BEHIND[tensor.untyped_storage()._cdata][1].view(-1).view(tensor.dtype)
    return flat.as_strided(shape, stride, int(flat.storage_offset()) + int(start))


def _as_strided(tensor: torch.Tensor, shape: Any, stride: Any, start: Any = None) -> torch.Tensor:
    start = tensor.storage_offset() if start is None else start
    return _wrapped(_viewed(tensor, shape, stride, start))


def _wrapped(values: torch.Tensor) -> torch.Tensor:
    made = torch._C._acc.create_empty_tensor(tuple(values.shape), values.dtype)
    _BEHIND[made.untyped_storage()._cdata] = made, values
    return made


def _poisoned(made: torch.Tensor) -> torch.Tensor:
    made.untyped_storage().fill_(_POISON)
    return _wrapped(made)


def _is_ours(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def _on_the_host(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Do an operation with what is behind, after all that is before it in the current stream."""
    ours: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    """Where an ordinary tensor is -> it, and what it is behind: for operations in place."""

    def ordinary(value: Any) -> Any:
        if not _is_ours(value):
            return value
        found = behind(value)
        ours[id(found)] = found, value
        return found

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return ours[id(value)][1] if id(value) in ours else _wrapped(value)

    args, kwargs = pytree.tree_map(ordinary, (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    work = partial(operation.overloadpacket, *args, **kwargs)
    if operation.is_view:  # which looks at no value
        return pytree.tree_map(wrapped, work())
    stream = _MODULE.current_stream()
    if operation._schema.is_mutable:  # in place: like a copy, it is only begun
        stream.add(0, work)
        return wrapped(kwargs["out"] if "out" in kwargs else args[0])
    stream.synchronize()
    return pytree.tree_map(wrapped, work())


def _copied(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> Any:
    stream = _MODULE.current_stream()
    if non_blocking and not _is_ours(source):
        assert BUS.is_pinned(source), "only from pinned memory can a copy be begun"
        into = behind(target)
        stream.add(source.nbytes, partial(into.copy_, source))
        return target
    from_, into = (behind(tensor) if _is_ours(tensor) else tensor for tensor in (source, target))
    stream.add(0, partial(into.copy_, from_))
    if not (_is_ours(source) and _is_ours(target)):
        stream.synchronize()
    return target


def _empty(size: Any, dtype: Any = None, **options: Any) -> torch.Tensor:
    return _poisoned(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **options: Any) -> torch.Tensor:
    return _poisoned(torch.empty(size, dtype=dtype))


def pinned(nbytes: int) -> torch.Tensor:
    """Stand in for :func:`llmload.checkpoint.staging.pinned`: torch has none for this device."""
    made = torch.empty(nbytes, dtype=torch.uint8)
    BUS.pinned.append(made)
    BUS.most_pinned = max(BUS.most_pinned, sum(p.nbytes for p in BUS.pinned))
    return made[:]


def unpin() -> None:
    """Stand in for :func:`llmload.checkpoint.staging.unpin`: what nobody holds is given back."""
    BUS.pinned = [memory for memory in BUS.pinned if _users(memory) > 1]


def _users(memory: torch.Tensor) -> int:
    """Return how many tensors lie over the same memory."""
    storage = memory.untyped_storage()
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count - 1  # the object that we ask by is one


staging.pinned, staging.unpin = pinned, unpin
_setup_privateuseone_for_python_backend(rename=NAME, backend_module=_MODULE)
_FALLBACK = torch.library.Library("_", "IMPL")
_FALLBACK.fallback(_on_the_host, "PrivateUse1")
_OURS = torch.library.Library("aten", "IMPL")
_OURS.impl("empty.memory_format", _empty, "PrivateUse1")
_OURS.impl("empty_strided", _empty_strided, "PrivateUse1")
_OURS.impl("as_strided", _as_strided, "PrivateUse1")
_OURS.impl("_copy_from", _copied, "PrivateUse1")
DEVICE = torch.device(NAME, 0)
