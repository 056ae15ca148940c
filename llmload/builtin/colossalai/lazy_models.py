"""ColossalAI's lazy tensors: made under its context and no longer, filled one at a time.

Imported by functions only: this module needs torch, transformers and colossalai.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmload.plugin import (
    LlmloadError,
    LoadFailedError,
    Plain,
    RequestError,
    default_dtype,
    installed_transformers,
    some,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmload.plugin import LoadContext, Source, Target


@cache
def lazy_init() -> ModuleType:
    """Import ``colossalai.lazy.lazy_init``, and undo what the import does to torch.

    It replaces two dozen of torch's kernels for meta tensors by ones written for torch 1.12. On
    torch 2.13 ``item()`` of a meta tensor then gives 0, and ``roll`` its input.
    """
    with warnings.catch_warnings():  # of deprecations, and of what else could be installed
        warnings.simplefilter("ignore")
        from colossalai._analyzer._subclasses import _meta_registration
        from colossalai.lazy import lazy_init
    _meta_registration.meta_lib._destroy()
    return lazy_init  # type: ignore[no-any-return]


def why_not() -> str | None:
    """Try everything this module does on one small layer; return what fails, or None.

    Most of it is private to colossalai, so that its version alone tells nothing.
    """
    try:
        with lazily("a linear layer"):
            layer = nn.Linear(2, 1)
            layer.register_buffer("steps", torch.arange(0, 4, 2) + 1)
        if [is_lazy(tensor) for tensor in layer.state_dict().values()] != [True] * 3:
            return "LazyInitContext does not make every tensor lazy"
        materialise(layer.weight, torch.tensor([[1.0, 2.0]]))
        materialise(layer.bias, torch.tensor([3.0]))
        materialise(layer.get_buffer("steps"))
        found = [tensor.tolist() for tensor in layer.state_dict().values()]
        if found != [[[1.0, 2.0]], [3.0], [1, 3]] or type(layer.weight) is not nn.Parameter:
            return "a lazy tensor does not become what it is filled with"
    except Exception as error:  # whatever another version of colossalai or torch may raise
        return f"{type(error).__name__}: {error}"
    return None


@contextmanager
def lazily(what: str) -> Iterator[None]:
    """Make every new tensor lazy and initialise none; afterwards all is as it was.

    ``LazyInitContext`` does not clean up after itself where entering it fails half-way, and its
    patches would make a lazy tensor of whatever else is created: so it is open for a constructor
    and no longer.

    :param what: is built in the context, for the message.
    :raises RequestError: the context is open already, or ``what`` cannot be built in it.
    """
    from transformers import PreTrainedModel, modeling_utils

    module = lazy_init()
    if module.LazyInitContext._replaced:
        raise RequestError(
            "a LazyInitContext is open around the load",
            fix="Close it: the section `colossalai` opens its own where it is needed.",
        )
    patched = (
        torch,
        nn.init,
        modeling_utils,
        PreTrainedModel,
        module.LazyInitContext,
        module.LazyTensor,
        module.ConstructorManager,
        module.PretrainedManager,
    )
    with _attributes_kept(*patched):
        context = module.LazyInitContext()
        # Its own torch.FloatTensor and the like look here, where it never puts anything.
        context.overrides = module.ConstructorManager.overwrites
        try:
            with context, installed_transformers().no_init_weights():
                yield
        except LlmloadError:
            raise
        except Exception as error:
            raise RequestError(
                f"{what} cannot be built under LazyInitContext: {type(error).__name__}: {error}",
                fix="Remove the section `colossalai`.",
            ) from error


@contextmanager
def _attributes_kept(*owners: Any) -> Iterator[None]:
    """Give every attribute of modules and classes back the value it has now."""
    kept = [(owner, dict(vars(owner))) for owner in owners]
    try:
        yield
    finally:
        for owner, attributes in kept:
            for name, value in attributes.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)


def is_lazy(value: object) -> bool:
    """Whether ``value`` is a tensor that has no storage yet."""
    return isinstance(value, lazy_init().LazyTensor)


def lazy_tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield each lazy tensor of a model once: parameters, buffers and plain attributes."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        registries: tuple[Mapping[str, Any], ...] = (
            module._parameters,
            module._buffers,
            vars(module),
        )
        for registry in registries:
            for name, value in registry.items():
                if is_lazy(value) and id(value) not in seen:
                    seen.add(id(value))
                    yield f"{path}.{name}".lstrip("."), value


def materialise(
    lazy: Any, value: torch.Tensor | None = None, *, requires_grad: bool | None = None
) -> torch.Tensor:
    """Turn a lazy tensor into an ordinary one that holds ``value``, else what was recorded for it.

    It stays the same object, so whoever shares it has the value too.

    :param requires_grad: the tensor's; None for the lazy one's.
    """
    if requires_grad is None:
        requires_grad = stand_in(lazy).requires_grad
    if value is not None:
        # `materialize` takes what is there for the outcome of its replay, and turns the object's
        # class.
        lazy._materialized_data = value
    tensor: torch.Tensor = lazy.materialize().requires_grad_(requires_grad)
    # colossalai leaves its idea of the device behind, and a method that keeps the tensor alive.
    for left_over in ("_device", "tolist"):
        vars(tensor).pop(left_over)
    return tensor


def stand_in(lazy: Any) -> torch.Tensor:
    """Return the tensor, most often a meta one, that a lazy one takes its properties from.

    To ask the lazy one itself costs a fifth of a millisecond.
    """
    found: torch.Tensor = lazy._meta_data
    return found if lazy._materialized_data is None else lazy._materialized_data


def keep_dtype(lazy: Any, dtype: torch.dtype) -> None:
    """Let whoever materialises ``lazy`` later do it under ``dtype``.

    colossalai takes the default dtype of that moment.
    """

    def replay() -> torch.Tensor:
        # The attribute hides the class's method of that name, which is then found again.
        del lazy._materialize_data
        with default_dtype(dtype):
            return lazy._materialize_data()  # type: ignore[no-any-return]

    lazy._materialize_data = replay


class LazyPlacement(Plain):
    """Fills lazy tensors with ordinary ones, in place; what the file lacks is replayed."""

    replaceable = True

    def __init__(self, ctx: LoadContext) -> None:
        self._missing = ctx.newly_initialised
        self._dtype = ctx.dtype

    def prepare(self, model: PreTrainedModel) -> None:
        """Materialise what will not be placed: missing weights, and buffers of no file."""
        # A missing weight is replayed, initialisation and all; buffers that are not saved are in no
        # file.
        placed = model.state_dict().keys() - self._missing.keys()
        with default_dtype(self._dtype):
            for name, lazy in list(lazy_tensors(model)):
                if name not in placed:
                    self._replay(name, lazy)

    def _replay(self, name: str, lazy: Any) -> None:
        try:
            materialise(lazy)
        except RecursionError as error:  # each write to it that was recorded is one level deep
            raise RequestError(
                f"{name!r} cannot be built under LazyInitContext: its constructor writes it entry"
                " by entry, too often to be replayed",
                fix="Remove the section `colossalai`.",
            ) from error

    def place(self, target: Target, source: Source) -> torch.Tensor:
        """Return the lazy tensor, which is one no longer."""
        value = super().place(target, source)
        lazy = getattr(target.module, target.attribute)
        if not is_lazy(lazy):
            return value
        like = stand_in(lazy)
        asked = installed_transformers().trains_once_loaded
        trains = asked(like) if isinstance(lazy, nn.Parameter) else None
        return materialise(lazy, value, requires_grad=trains)

    def finish(self, model: PreTrainedModel) -> None:
        """Make sure that nothing is lazy any more.

        :raises LoadFailedError: a tensor got no value; to replay it would be uninitialised memory.
        """
        left = []
        for name, lazy in list(lazy_tensors(model)):
            # Some operations cannot be recorded: colossalai gives the tensor values early, and
            # leaves its class.
            if lazy._materialized_data is None:
                left.append(name)
            else:
                materialise(lazy)
        if left:
            raise LoadFailedError(
                f"{some(left)} got no value",
                fix="Remove the section `colossalai`, and report this.",
            )
