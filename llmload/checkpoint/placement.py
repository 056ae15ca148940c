"""Where and how each weight is stored: the one question that plugins answer for the engine.

The engine reads a weight, brings it under its name and shape in the model, and asks the placement
for what to put there. Plain tensors are :class:`Plain`; a plugin that partitions, quantises or
shares sets its own ``ctx.placement`` in ``init_context``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from llmload.checkpoint.assembled import Assembled
    from llmload.checkpoint.header import TensorInfo

WORTH_MAPPING: Final = 2**16
"""Bytes of a part below which mapping it takes longer than copying it."""


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One parameter or buffer of the model, still on the meta device."""

    name: str
    """Full name, as in ``state_dict``."""
    module: nn.Module
    """The module that owns it."""
    attribute: str
    """Its name there."""
    like: torch.Tensor
    """The meta tensor: final shape; its dtype is not yet by the dtype plan."""
    dtype: torch.dtype
    """Final dtype, modules that stay float32 considered."""
    device: torch.device
    """Final device."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What a placement returns where the value is not stored in what takes the target's place.

    This process keeps only a part of it, or its codes in a tensor that wraps others.
    """

    parameter: torch.Tensor
    """Takes the target's place in the model."""
    stored: torch.Tensor
    """What is stored; a digest of it is held to what was asked of the source."""


class Source:
    """What the checkpoint has for one target, after conversion and before any cast.

    Nothing is read until :meth:`whole` or :meth:`flat` is asked for and the result is used.
    """

    def __init__(
        self,
        value: torch.Tensor | Assembled,
        asked: Callable[..., None],
        release: Callable[[], None],
        fill: Callable[[torch.Tensor, torch.Tensor], None],
        send: Callable[[torch.Tensor, torch.Tensor], None],
        own: Callable[[torch.Tensor], torch.Tensor | None],
        origin: TensorInfo | None = None,
        *,
        may_stay: bool = True,
    ) -> None:
        self.origin = origin
        """The tensor of the checkpoint whose bytes these are; None for what was converted."""
        self.may_stay = may_stay
        """Whether what is placed may lie over the file's pages; where it may not, it is copied."""
        self._value = value
        self._asked = asked
        self._release = release
        self._fill = fill
        self._send = send
        self._own = own

    @property
    def shape(self) -> torch.Size:
        """Same as the target's."""
        return self._value.shape

    @property
    def dtype(self) -> torch.dtype:
        """As stored in the checkpoint."""
        return self._value.dtype

    def empty(self, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
        """A tensor like the value, on the CPU or another device, for :meth:`fill`."""
        import torch

        if isinstance(self._value, torch.Tensor):
            return torch.empty_like(self._value, dtype=dtype, device=device)
        return torch.empty(self.shape, dtype=dtype, device=device)

    def whole(self, *, later: bool = False) -> torch.Tensor:
        """The value, on the CPU; over the file's own pages unless it was converted.

        :param later: nobody looks at the values of what lies on pages before the load is over: they
            need not be in memory yet.
        """
        import torch

        if isinstance(self._value, torch.Tensor):
            self._asked(self._value, later=later)
            return self._value
        return self.flat(0, self.shape.numel()).view(self.shape)

    def flat(self, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of the value laid out flat; nothing else is read."""
        import torch

        pieces = list(self._pieces(start, stop))
        for piece in pieces:
            self._asked(piece)
        if len(pieces) == 1:
            return pieces[0]
        # Several pieces are merged experts, of as many tensors of the file: they are copied, so
        # that nothing lies on the file's pages any more.
        joined = torch.cat(pieces) if pieces else torch.empty(0, dtype=self.dtype)
        self._release()
        return joined

    def to(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The value in a dtype on a device, for whoever works with it there at once.

        On the CPU this is :meth:`whole`, cast. On its way to an accelerator it is read by several
        threads into pinned memory, and need not have arrived: it has in the order of the current
        stream, in which the next operation finds it. Nothing lies on the file's pages then.
        """
        if device.type == "cpu":
            return self.whole().to(dtype)
        out = self.empty(dtype, device)
        for sent, piece in self._copies(out, 0, None):
            self._send(sent, piece)
        self._release()
        return out

    def fill(self, out: torch.Tensor, start: int = 0, stop: int | None = None) -> None:
        """Copy the value, or elements ``start`` to ``stop`` of it laid out flat, into ``out``.

        The fast way to cast: another thread may do it, while the next targets are placed, and
        releases the pages. ``out`` is a tensor of any dtype on any device; nobody looks at what is
        in it before ``finish``.
        """
        for filled, piece in self._copies(out, start, stop):
            self._fill(filled, piece)

    def _copies(
        self, out: torch.Tensor, start: int, stop: int | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield what is to be copied, and where to; asks for it."""
        import torch

        if (start, stop) == (0, None) and isinstance(self._value, torch.Tensor):
            self._asked(self._value, later=True)
            yield out, self._value
            return
        stop = self.shape.numel() if stop is None else stop
        for piece in self._pieces(start, stop):
            self._asked(piece, later=True)
            # `out` shrinks to what is still to be filled.
            first, out = out.view(-1).tensor_split([piece.numel()])
            yield first, piece

    def mapped(self, start: int, stop: int) -> torch.Tensor | None:
        """Elements ``start`` to ``stop``, flat, over file pages that end with this tensor.

        Writing to it changes neither the file nor the source. None where the value was converted:
        it then lies in memory, or in several places of the file. None too where the process may
        have no more mappings, and where nothing may stay on them.
        """
        if self.origin is None or not self.may_stay:
            return None
        # One piece: what is not converted lies in one tensor of the file.
        (piece,) = self._pieces(start, stop)
        owned = self._own(piece)
        if owned is not None:
            self._asked(piece, later=True)
        return owned

    def _pieces(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Yield what is asked for as views of what there is."""
        import torch

        if isinstance(self._value, torch.Tensor):
            yield self._value.reshape(-1)[start:stop]
        else:
            yield from self._value.pieces(start, stop)

    def release(self) -> None:
        """Say that what was asked for has been copied: the pages behind it leave the process."""
        self._release()


class Placement(Protocol):
    """Decides where and how each weight is stored.

    Where the streaming loader declines, no other loader asks it, so the load is refused. A
    placement that only saves memory, or whose plugin tells ``from_pretrained`` the same through
    ``ctx.load_options``, has an attribute ``replaceable = True`` and lets it go ahead.
    """

    def prepare(self, model: PreTrainedModel) -> None:
        """Change the model, built on the meta device, before anything is placed.

        Modules may be replaced; names in ``state_dict`` and shapes must stay.
        """

    def place(self, target: Target, source: Source) -> torch.Tensor | Part:
        """Return what takes the target's place: a parameter, or a tensor that becomes one.

        Called once for each target that the checkpoint has, in the order of their names. A tensor
        for a parameter is wrapped (``requires_grad`` if floating point), one for a buffer is not.
        Shapes agree already. May set attributes of ``target.module``; must not write into the
        source.
        """

    def finish(self, model: PreTrainedModel) -> None:
        """Turn what is left: all is placed, missing weights are initialised, ties are tied."""


class Splitting(Placement, Protocol):
    """A placement that keeps a part of each parameter, of those too that another one made.

    A plugin that changes how values are stored, and finds one in ``ctx.placement``, wraps it.
    """

    @property
    def device(self) -> torch.device:
        """Where values are worked on before they are split."""

    def part(self, parameter: nn.Parameter, values: Callable[[int, int], torch.Tensor]) -> Part:
        """Split a parameter of the whole shape, whose own values are not looked at.

        :param values: returns the elements from an index to another of the whole laid out flat.
        """


class Plain:
    """Ordinary tensors: the file's own pages where dtype and device agree, else a cast copy."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Leave the model as it is."""

    def extent(
        self, name: str, module: nn.Module, attribute: str, shape: Sequence[int]
    ) -> tuple[int, int]:
        """Return which elements of a value, laid out flat, ``place`` will ask for: all.

        Called after ``prepare``, for every target that the checkpoint has.

        :param name: the target's full name.
        :param module: the module that owns it.
        :param attribute: its name there.
        :param shape: of the value.
        :return: the first, and one past the last; the same twice for none.
        """
        return 0, math.prod(shape)

    def place(self, target: Target, source: Source) -> torch.Tensor:
        """Return the value in the target's dtype on its device, copied only where it must be.

        What is cast on the CPU has its values by ``finish``, not before: see :meth:`Source.fill`.
        What goes to an accelerator has them for its current stream: see :meth:`Source.to`.
        """
        if target.device.type != "cpu":
            return source.to(target.device, target.dtype)
        if source.dtype == target.dtype and source.may_stay:
            return source.whole(later=True)
        # Not by `to`: this copy can be made by another thread, piece by piece, with its pages let
        # go.
        copied = source.empty(target.dtype)
        source.fill(copied)
        return copied

    def finish(self, model: PreTrainedModel) -> None:
        """Leave the model as it is."""
