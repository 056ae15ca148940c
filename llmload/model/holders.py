"""What holds tensors, and how it is put back as it was.

Imported lazily, by functions: this module needs torch.
"""

from __future__ import annotations

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LRU_CACHE = type(functools.lru_cache(lambda: None))

_LIBRARIES = frozenset(
    {"torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "numpy"}
    | {"llmload", "colossalai", "safetensors", "tokenizers", "huggingface_hub", "pydantic"}
    | sys.stdlib_module_names
)
"""Packages whose classes and modules keep no tensors of a model."""
_SMALL = 2**26
"""Bytes up to which the values of an array of NumPy are put back."""
_DEEP = 4


@dataclass(frozen=True)
class Names:
    """Some of the names in a namespace."""

    space: dict[str, Any]
    names: list[str]


def is_of_a_library(thing: Any) -> bool:
    """Say whether a class, function or module is of one of the libraries, or of Python's own."""
    top = _package(thing)
    return top in _LIBRARIES and top != "__main__"


def is_foreign(thing: Any, function: types.FunctionType) -> bool:
    """Say whether a class, function or module that a function names is of an installed package, and
    of another one than the function."""
    top = _package(thing)
    if is_of_a_library(thing) or top == _package(function):
        return is_of_a_library(thing)
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _package(thing: Any) -> str:
    name = thing.__name__ if isinstance(thing, types.ModuleType) else thing.__module__
    return str(name).partition(".")[0]


def is_looked_into(value: Any, function: types.FunctionType) -> bool:
    """Say whether a global that a function names may hold what belongs to a model."""
    if isinstance(value, torch.Tensor | nn.Module | list | dict | set | deque | LRU_CACHE):
        return True
    if has_state(value) or isinstance(value, functools.partial):
        return True
    if isinstance(value, types.ModuleType):
        return False
    kind = value if isinstance(value, type | types.FunctionType) else type(value)
    return not is_foreign(kind, function)


def names_in(code: types.CodeType) -> set[str]:
    """Return the names that code uses, of functions inside it too."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= names_in(constant)
    return names


def functions_in(attribute: Any) -> Iterator[Any]:
    """Yield the functions, or caches of some, that an attribute of a class is made of."""
    if isinstance(attribute, staticmethod | classmethod):
        attribute = attribute.__func__
    parts: tuple[Any, ...] = (attribute,)
    if isinstance(attribute, property):
        parts = (attribute.fget, attribute.fset)
    for part in parts:
        if isinstance(part, types.FunctionType | LRU_CACHE):
            yield part


def slots(value: Any) -> Iterator[str]:
    """Yield the slots of an object that are filled."""
    for kind in type(value).__mro__:
        if is_of_a_library(kind):
            continue
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name


def has_state(value: Any) -> bool:
    """Say whether it is a generator of random numbers or an array of NumPy."""
    return isinstance(value, torch.Generator | random.Random) or _is_of_numpy(value)


def _is_of_numpy(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    kinds = () if numpy is None else (numpy.ndarray, numpy.random.Generator)
    return numpy is not None and isinstance(value, (*kinds, numpy.random.RandomState))


def may_hold_meta(holder: Any) -> bool:
    """Say whether there is a tensor on the meta device in it; of a cache nobody can tell."""
    if isinstance(holder, LRU_CACHE):
        return True
    if isinstance(holder, Names):
        held: Any = [holder.space.get(name) for name in holder.names]
    elif isinstance(holder, types.CellType):
        held = _content(holder)
    elif isinstance(holder, type):
        held = list(vars(holder).values())
    elif isinstance(holder, types.FunctionType):
        held = holder.__defaults__
    elif isinstance(holder, functools.partial):
        held = holder.args
    else:
        held = holder if isinstance(holder, dict | list | deque | set) else ()
    return _has_meta(held, _DEEP)


def _has_meta(value: Any, depth: int) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_meta
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple | deque | set | frozenset):
        return False
    return depth > 0 and any(_has_meta(item, depth - 1) for item in value)


def contents(holder: Any) -> Callable[[], Any]:
    """Return what puts back the present contents of an object that holds others."""
    if isinstance(holder, dict):
        return functools.partial(_refill, holder, dict(holder))
    if isinstance(holder, list | deque | set):
        return functools.partial(_refill_items, holder, list(holder))
    if isinstance(holder, types.CellType):
        return functools.partial(_refill_cell, holder, _content(holder))
    if isinstance(holder, type):
        return functools.partial(_reset_class, holder, dict(vars(holder)))
    if isinstance(holder, Names):
        values = {name: holder.space[name] for name in holder.names}
        return functools.partial(_reset_names, holder.space, values)
    if isinstance(holder, types.FunctionType):
        return functools.partial(setattr, holder, "__defaults__", holder.__defaults__)
    if isinstance(holder, functools.partial):
        state = (holder.func, holder.args, holder.keywords, vars(holder))
        return functools.partial(holder.__setstate__, state)  # type: ignore[attr-defined]
    if isinstance(holder, LRU_CACHE):
        return functools.partial(_empty_cache, holder, holder.cache_info().misses)
    if has_state(holder):
        return _state(holder)
    filled = {name: getattr(holder, name) for name in slots(holder)}
    return functools.partial(_reset_slots, holder, filled)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return _EMPTY_CELL


_EMPTY_CELL = object()


def _refill_cell(cell: types.CellType, content: Any) -> None:
    if content is not _EMPTY_CELL:
        cell.cell_contents = content
    elif _content(cell) is not _EMPTY_CELL:
        del cell.cell_contents


def _refill(holder: dict[Any, Any], entries: dict[Any, Any]) -> None:
    # By identity: to compare tensors by value is no yes or no, and costs what they hold.
    if [*map(id, holder)] != [*map(id, entries)] or (
        [*map(id, holder.values())] != [*map(id, entries.values())]
    ):
        holder.clear()
        holder.update(entries)


def _refill_items(holder: Any, items: list[Any]) -> None:
    if [*map(id, holder)] != [*map(id, items)]:
        holder.clear()
        (holder.update if isinstance(holder, set) else holder.extend)(items)


def _reset_class(owner: type, attributes: dict[str, Any]) -> None:
    for name in vars(owner).keys() - attributes.keys():
        delattr(owner, name)
    for name, value in attributes.items():
        if vars(owner).get(name) is not value:
            setattr(owner, name, value)


def _reset_names(space: dict[str, Any], values: dict[str, Any]) -> None:
    for name, value in values.items():
        if space.get(name, space) is not value:
            space[name] = value


def _reset_slots(holder: Any, values: dict[str, Any]) -> None:
    for name in list(slots(holder)):
        if name not in values:
            object.__delattr__(holder, name)
    for name, value in values.items():
        object.__setattr__(holder, name, value)


def _empty_cache(cache: Any, misses: int) -> None:
    # What it took in cannot be told from what it had, and is computed again.
    if cache.cache_info().misses != misses:
        cache.cache_clear()


def _state(holder: Any) -> Callable[[], Any]:
    """Return what puts back the state of a generator, or the values of an array."""
    if isinstance(holder, torch.Generator):
        return functools.partial(holder.set_state, holder.get_state())
    if isinstance(holder, random.Random):
        return functools.partial(holder.setstate, holder.getstate())
    if hasattr(holder, "bit_generator"):
        bits = holder.bit_generator
        return functools.partial(setattr, bits, "state", bits.state)
    if hasattr(holder, "get_state"):
        return functools.partial(holder.set_state, holder.get_state())
    if holder.nbytes > _SMALL or not holder.flags.writeable:
        return lambda: None
    return functools.partial(holder.__setitem__, ..., holder.copy())
