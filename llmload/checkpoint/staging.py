"""Weights on their way to an accelerator: through pinned memory, while others are read.

A copy from ordinary memory keeps the thread that makes it until the accelerator has everything. One
from pinned memory is only begun, and the next piece is read meanwhile.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

BUFFER: Final = 2**22
"""Bytes of a buffer, in which a weight goes piece by piece: enough for a bus at full speed, and few
enough that one weight keeps several threads busy with reading."""
MOST_BUFFERS: Final = 16
"""Buffers of one load: some are filled while the others are on their way."""
WORTH_PINNING: Final = 2**20
"""Bytes of a weight below which none is made. Where there are some, smaller ones use them too: a
copy from ordinary memory waits for all that were begun before."""


class Staging(AbstractContextManager["Staging"]):
    """Buffers of pinned memory, each filled anew once what was in it has arrived.

    Copies are begun in the stream that is current, in their order: what is done there next finds
    the values, and need not wait for them. At the end of the ``with`` block no copy is under way
    and no buffer is left, whatever happened; those that an error's traceback holds go with it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._free: deque[_Buffer] = deque()
        self._pinned = 0
        self._most = MOST_BUFFERS

    def __exit__(self, *exc: object) -> None:
        with suppress(Exception):  # of copies; `finish` has raised it, or something else was
            self.finish()
        self._free.clear()
        if self._pinned:
            unpin()

    def serves(self, out: torch.Tensor) -> bool:
        """Whether a tensor gets its values through buffers.

        Not on a device whose copies cannot be waited for one by one (``mps``), not where no memory
        can be pinned, and not before a tensor is worth it.
        """
        if _streams(out.device) is None:
            return False
        with self._changed:
            if not self._pinned and self._most and out.nbytes >= WORTH_PINNING:
                self._pin()
            return self._pinned > 0

    def send(
        self, out: torch.Tensor, dtype: torch.dtype, write: Callable[[torch.Tensor], None]
    ) -> None:
        """Begin to copy values to ``out``, on an accelerator, contiguous and at most a buffer.

        :param dtype: of the values, where they lie.
        :param write: fills memory on the host that has as many elements, of ``dtype`` or of
            ``out``'s.
        """
        import torch

        # bfloat16 is the upper half of a float32: it crosses the bus as it is, and is moved there
        # as an integer, so that all bits are exact, those of NaN too. Other casts are left to the
        # host, as from_pretrained leaves them: a device may make other bits of NaN.
        halves = (dtype, out.dtype) == (torch.bfloat16, torch.float32)
        carried = dtype if halves else out.dtype
        with self._buffer() as buffer:
            staged = buffer.memory[: out.numel() * carried.itemsize].view(carried)
            write(staged)
            if halves:
                arriving = staged.view(torch.int16).to(out.device, non_blocking=True)
                out.view(torch.int32).copy_(arriving).bitwise_left_shift_(16)
            else:
                out.copy_(staged, non_blocking=True)
            buffer.sent_to(out.device)

    def finish(self) -> None:
        """Wait until all that was sent has arrived; no other thread sends any more."""
        for buffer in self._free:
            buffer.wait()

    @contextmanager
    def _buffer(self) -> Iterator[_Buffer]:
        with self._changed:
            is_free = bool(self._free) and self._free[0].has_arrived()
            if not is_free and self._pinned < self._most:
                self._pin()
            self._changed.wait_for(lambda: self._free)
            buffer = self._free.popleft()
        try:
            buffer.wait()
            yield buffer
        finally:
            with self._changed:
                self._free.append(buffer)
                self._changed.notify()

    def _pin(self) -> None:
        """Make one buffer more, the first to be taken; where that fails, none is tried again."""
        try:
            self._free.appendleft(_Buffer(pinned(BUFFER)))
            self._pinned += 1
        except RuntimeError:
            self._most = self._pinned


class _Buffer:
    """Memory, and the last copy out of it."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self._sent: Any = None

    def sent_to(self, device: torch.device) -> None:
        """Note that a copy has begun in the device's current stream."""
        streams = _streams(device)
        self._sent = streams.Event()
        self._sent.record(streams.current_stream(device))

    def has_arrived(self) -> bool:
        return self._sent is None or self._sent.query()

    def wait(self) -> None:
        if self._sent is not None:
            self._sent.synchronize()


def pieces(out: torch.Tensor, part: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield two contiguous tensors of as many elements, laid out flat, in what fits a buffer."""
    import torch

    step = BUFFER // max(out.itemsize, part.itemsize)
    yield from zip(*(torch.split(tensor.view(-1), step) for tensor in (out, part)), strict=True)


def current_stream(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Return what makes this thread's stream of a device the current one, in any thread."""
    streams = _streams(device)
    if streams is None:
        return nullcontext
    stream = streams.current_stream(device)
    return lambda: streams.stream(stream)


def pinned(nbytes: int) -> torch.Tensor:
    """Return memory on the host that accelerators read without the host's help.

    :raises RuntimeError: there is none.
    """
    import torch

    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def unpin() -> None:
    """Have torch give back pinned memory that nobody uses, which it else keeps for the next one."""
    import torch

    release = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None)
    if release is not None:
        with suppress(RuntimeError):
            release()


def _streams(device: torch.device) -> Any:
    """Return torch's module for a kind of accelerator; None where it has not all that we need."""
    import torch

    module = None if device.type == "cpu" else getattr(torch, device.type, None)
    needed = ("Event", "current_stream", "stream")
    return module if all(hasattr(module, name) for name in needed) else None
