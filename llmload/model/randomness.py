"""Finds the random operations of a forward, and answers what meta tensors cannot.

Imported lazily, by functions: this module needs torch.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextmanager
def states_kept(devices: Iterable[int] = ()) -> Iterator[None]:
    """Restore torch's, Python's and NumPy's random states afterwards.

    :param devices: those of CUDA whose states are kept too.
    """
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    legacy = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(legacy)


@dataclass(frozen=True, kw_only=True)
class RandomOp:
    """An operation of the forward whose result depends on a random generator."""

    op: str
    """Its name, such as ``aten.bernoulli_``."""
    module: str
    """Dotted path of the innermost module whose ``forward`` issued it; empty for the model."""
    module_class: str
    """Name of that module's class."""
    probability: float | None
    """The rate at which it drops, where it has one."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation that draws at random and whose draw the forward uses."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[RandomOp] = []
        self._paths = {id(module): name for name, module in model.named_modules()}
        self._unused: dict[int, tuple[torch.Tensor, RandomOp]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._unused and not func.is_view:
            self._take_uses(func, args, kwargs)
        result = _answer(func, args, kwargs)
        if _is_random(func):
            self._take_draw(func, args, kwargs, result)
        return result

    def _take_draw(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        rate = _rate(func, args, kwargs)
        # Dropout at 0 or 1 draws nothing that matters.
        if rate is not None and not 0.0 < rate < 1.0:
            return
        path, kind = self._issuer()
        op = RandomOp(op=str(func.overloadpacket), module=path, module_class=kind, probability=rate)
        # A plain draw (`rand`, `normal_`) counts once something is computed with it.
        if rate is None and isinstance(result, torch.Tensor):
            self._unused[_storage(result)] = (result, op)
        else:
            self.found.append(op)

    def _take_uses(self, func: Any, args: Any, kwargs: Any) -> None:
        """Count a draw once it is used, except where the outcome is certain.

        LayerDrop draws in every training forward and compares with its rate, also with 0. BigBird
        initialises a module in its forward and then gives it the weights of another.
        """
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and _storage(value) in self._unused:
                _, op = self._unused.pop(_storage(value))
                if not _is_certain(func, args):
                    self.found.append(op)

    def _issuer(self) -> tuple[str, str]:
        """Find the innermost module of the model on the Python stack."""
        # By the stack rather than by hooks: those would change the model, and checkpointing runs a
        # forward again in the backward.
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in self._paths:
                return self._paths[id(owner)], type(owner).__name__
            frame = frame.f_back
        return "", ""


_ELEMENTWISE: Final = frozenset(
    {
        torch.ops.aten.add.Tensor,
        torch.ops.aten.sub.Tensor,
        torch.ops.aten.mul.Tensor,
        torch.ops.aten.div.Tensor,
        torch.ops.aten.mul.Scalar,
        torch.ops.aten.div.Scalar,
        torch.ops.aten.pow.Tensor_Scalar,
        torch.ops.aten.neg.default,
        torch.ops.aten.rsqrt.default,
    }
)
"""Most of a model's operations, for which torch's own meta kernels, in Python, take half the time
of a forward and backward (2.13: 350 us each)."""


def _answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``func``; where it asks a meta tensor for values, give the plainest answer.

    A number is zero, a condition is False, and the elements that are not zero are all.
    """
    name = func._schema.name
    if args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
        if func in _ELEMENTWISE and (shape := _shape_of_all(args)) is not None:
            return torch.empty(shape, dtype=args[0].dtype, device="meta")
        if name == "aten::_local_scalar_dense" and not _is_float(args[0]):
            return False if args[0].dtype == torch.bool else 0
        if name == "aten::nonzero":
            return _all_positions(args[0])
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            args = (args[0], list(_without_masks(args[1])), *args[2:])
        if name == "aten::_grouped_mm":
            # Its meta kernel knows bfloat16 alone, its real kernels every dtype.
            halves = [a.bfloat16() if _is_float(a) else a for a in args]
            return func(*halves, **kwargs).to(args[0].dtype)
    result = func(*args, **kwargs)
    if name == "aten::rand" and not result.is_meta:
        # LayerDrop compares it with its rate: the largest draw skips no layer.
        result.fill_(1.0 - torch.finfo(result.dtype).eps)
    return result


def _shape_of_all(args: tuple[Any, ...]) -> torch.Size | None:
    """Return the shape that an elementwise operation gives; None but for one floating dtype, and
    operands in the order of their elements, as then the result is."""
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    whole, dtype = tensors[0].shape, tensors[0].dtype
    if not dtype.is_floating_point or any(isinstance(value, complex) for value in args):
        return None
    for tensor in tensors:
        plain = tensor.is_meta and type(tensor) in (torch.Tensor, nn.Parameter)
        if not (plain and tensor.is_contiguous() and tensor.dtype == dtype):
            return None
        if tensor.shape != whole:
            try:
                whole = torch.broadcast_shapes(whole, tensor.shape)  # type: ignore[no-untyped-call]
            except RuntimeError:  # torch's own kernel has better words for it
                return None
    return whole


def _all_positions(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty((tensor.numel(), tensor.ndim), dtype=torch.int64, device="meta")


def _without_masks(indices: Iterable[torch.Tensor | None]) -> Iterator[torch.Tensor | None]:
    """Replace each boolean mask among the indices by one index for each of its dimensions."""
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            yield from _all_positions(index).unbind(1)
        else:
            yield index


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@functools.cache
def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags or "dropout_p" in _arguments(func)


@functools.cache
def _arguments(func: Any) -> dict[str, Any]:
    """Return the names of ``func``'s arguments, in order, with their defaults."""
    return {argument.name: argument.default_value for argument in func._schema.arguments}


def _rate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """Return the rate at which ``func`` drops, where its arguments say so."""
    values = _arguments(func) | dict(zip(_arguments(func), args, strict=False)) | kwargs
    if values.get("train") is False:
        return 0.0
    rate = values.get("dropout_p", values.get("p"))
    if not isinstance(rate, float | int):
        return None
    # Drawn with the probability of keeping; rounded so that 1 - 0.9 says 0.1.
    return round(1.0 - rate, 12) if "bernoulli" in func._schema.name else float(rate)


def _is_certain(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether comparing a draw from [0, 1) with a bound has only one outcome."""
    name = str(func.overloadpacket)
    bound = args[1] if len(args) > 1 and isinstance(args[1], float | int) else None
    if bound is None:
        return False
    return name in ("aten.lt", "aten.ge") and (bound <= 0 or bound >= 1)


def _storage(tensor: torch.Tensor) -> int:
    """Return what tells a tensor and its views from others, also on the meta device."""
    return int(tensor.untyped_storage()._cdata)
