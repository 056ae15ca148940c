"""Every tensor that a model can reach: parameters, buffers, and what it keeps in other places.

Models keep tensors as plain attributes, in lists and dicts, in objects of their own, in closures of
their hooks and in containers of their classes. ``state_dict`` and ``named_buffers`` know none of
them, and each of them can be on the meta device, uninitialised, or changed by a forward.

Imported lazily, by functions: this module needs torch.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

Visit = Callable[[str, torch.Tensor], torch.Tensor]
"""Takes a tensor's path and the tensor; returns what is to be in its place, most often itself."""

_PLAIN = frozenset(
    {int, float, complex, str, bytes, bool, type(None)}
    | {torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format}
)
"""Types of values that hold nothing. Asked for by identity: most of what there is are these."""
_EMPTY = frozenset((dict, OrderedDict, list, tuple, set))
_OPAQUE = (
    torch.Generator,
    types.ModuleType,
    types.BuiltinFunctionType,
    torch.autograd.graph.Node,
)
"""Objects that keep no tensor of a model, and have much else inside."""
_LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "bitsandbytes",
    "builtins",
)
"""Packages whose classes keep no tensors of a model in attributes of the class."""


def registered(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor of each parameter and buffer, tied ones once, in one walk."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        dotted = f"{path}." if path else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield dotted + name, tensor


def carried(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield what a tensor keeps in attributes, as a quantised one keeps statistics of its codes.

    What modules that it knows of keep is not its own.
    """
    found: list[torch.Tensor] = []

    def note(path: str, held: torch.Tensor) -> torch.Tensor:
        found.append(held)
        return held

    walk = _Walk(note, lambda holder: None)
    for name, value in vars(tensor).items():
        if not isinstance(value, nn.Module):
            walk.value(name, value)
    yield from found


def tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the path and the tensor for each place where a model keeps one; ties more than once.

    Parameters and buffers have their own names, others a path such as ``h.0.cache[mask]``.
    """
    found: list[tuple[str, torch.Tensor]] = []

    def note(path: str, tensor: torch.Tensor) -> torch.Tensor:
        found.append((path, tensor))
        return tensor

    replace_tensors(model, note)
    yield from found


def replace_tensors(model: nn.Module, visit: Visit) -> None:
    """Put what ``visit`` returns in the place of each tensor that a model can reach."""
    _Walk(visit, lambda holder: None).value("", model)


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Restore afterwards what everything that a model can reach consists of.

    Entries of modules, dicts, lists, sets, objects, closures and of the classes' own containers are
    put back, those that came anew are removed. What is inside a tensor is not looked at.
    """
    restore: list[Callable[[], None]] = []
    empty: list[Any] = []

    def take(holder: Any) -> None:
        if type(holder) in _EMPTY and not holder:  # most of what a module has, such as its hooks
            empty.append(holder)
        else:
            restore.append(_contents(holder))

    _Walk(lambda path, tensor: tensor, take).value("", model)
    try:
        yield
    finally:
        for holder in empty:
            if holder:
                holder.clear()
        for put_back in restore:
            put_back()


class _Walk:
    """Goes through all that a model can reach, each object once.

    :param enter: is given each object that holds others and can change, before what is in it.
    """

    def __init__(self, visit: Visit, enter: Callable[[Any], None]) -> None:
        self._visit = visit
        self._enter = enter
        self._seen: dict[int, Any] = {}
        self._classes: set[type] = set()

    def value(self, path: str, value: Any) -> Any:
        """Go through one value; returns what is to be in its place."""
        if type(value) in _PLAIN:
            return value
        if isinstance(value, torch.Tensor):
            return self._visit(path, value)
        # What cannot change is made anew where something in it was replaced.
        if isinstance(value, tuple | frozenset):
            return self._rebuilt(path, value)
        if id(value) not in self._seen:
            self._seen[id(value)] = value  # kept, so that no other object has its id
            if isinstance(value, nn.Module):
                self._module(path, value)
            elif not (isinstance(value, _OPAQUE) or hasattr(value, "to_diff_dict")):  # a config
                self._inside(path, value)
        return value

    def _rebuilt(self, path: str, value: Any) -> Any:
        items = [self.value(f"{path}[{at}]", item) for at, item in enumerate(value)]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

    def _inside(self, path: str, value: Any) -> None:
        if isinstance(value, dict):
            self._entries(path, value, "[{}]")
        elif isinstance(value, list | deque):
            self._enter(value)
            for at, item in enumerate(value):
                new = self.value(f"{path}[{at}]", item)
                if new is not item:
                    value[at] = new
        elif isinstance(value, set):
            self._enter(value)
            new = {self.value(f"{path}[{at}]", item) for at, item in enumerate(value)}
            if {*map(id, new)} != {*map(id, value)}:
                value.clear()
                value.update(new)
        elif isinstance(value, types.FunctionType):
            self._function(path, value)
        elif isinstance(value, types.MethodType):
            self.value(path, value.__self__)
            self.value(path, value.__func__)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.value(path, part)
        elif isinstance(value, type):
            self._class(path, value)
        else:
            self._object(path, value)

    def _module(self, path: str, module: nn.Module) -> None:
        attributes = vars(module)
        self._enter(attributes)
        dotted = f"{path}." if path else ""
        for name, value in attributes.items():
            kind = type(value)
            if kind in _PLAIN or (kind in _EMPTY and not value):
                # What comes into an empty one is to be taken out of it again.
                if kind not in _PLAIN and kind is not tuple:
                    self._enter(value)
            elif name in ("_parameters", "_buffers", "_modules"):
                self._entries(dotted, value, "{}")
            else:
                new = self.value(dotted + name, value)
                if new is not value:
                    attributes[name] = new
        if type(module) not in self._classes:
            self._class(path, type(module))

    def _entries(self, path: str, holder: dict[Any, Any], key: str) -> None:
        self._enter(holder)
        for name, value in holder.items():
            if type(value) in _PLAIN:
                continue
            new = self.value(path + key.format(name), value)
            if new is not value:
                holder[name] = new  # no entry comes or goes

    def _function(self, path: str, function: types.FunctionType) -> None:
        for cell in function.__closure__ or ():
            self._enter(cell)
            with suppress(ValueError):  # it is empty
                content = cell.cell_contents
                new = self.value(f"{path}.closure", content)
                if new is not content:
                    cell.cell_contents = new
        if vars(function):
            self._entries(path, vars(function), ".{}")
        self.value(f"{path}.defaults", function.__defaults__)

    def _class(self, path: str, owner: type) -> None:
        # Once for each class, however many modules are of it: a model has hundreds of a kind.
        for base in owner.__mro__:
            if base in self._classes:
                continue
            self._classes.add(base)
            if base.__module__.partition(".")[0] in _LIBRARIES:
                continue
            self._enter(base)
            for name, value in list(vars(base).items()):
                if name.startswith("__"):
                    continue
                if isinstance(value, torch.Tensor | list | dict | set | deque):
                    new = self.value(f"{path}.{name}", value)
                    if new is not value:
                        setattr(base, name, new)

    def _object(self, path: str, value: Any) -> None:
        entries = getattr(value, "__dict__", None)
        if isinstance(entries, dict):
            self._entries(path, entries, ".{}")
        slots = list(_slots(value))
        if slots:
            self._enter(value)
        for name in slots:
            content = getattr(value, name)
            new = self.value(f"{path}.{name}", content)
            if new is not content:
                object.__setattr__(value, name, new)


def _slots(value: Any) -> Iterator[str]:
    for kind in type(value).__mro__:
        if kind.__module__.partition(".")[0] in _LIBRARIES:
            continue
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name


def _contents(holder: Any) -> Callable[[], None]:
    """Return what puts back the present contents of an object that holds others."""
    if isinstance(holder, dict):
        return functools.partial(_refill, holder, dict(holder))
    if isinstance(holder, list | deque | set):
        return functools.partial(_refill_items, holder, list(holder))
    if isinstance(holder, types.CellType):
        try:
            return functools.partial(setattr, holder, "cell_contents", holder.cell_contents)
        except ValueError:  # it is empty
            return lambda: None
    if isinstance(holder, type):
        return functools.partial(_reset_class, holder, dict(vars(holder)))
    values = {name: getattr(holder, name) for name in _slots(holder)}
    return functools.partial(_reset_slots, holder, values)


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


def _reset_slots(holder: Any, values: dict[str, Any]) -> None:
    for name in list(_slots(holder)):
        if name not in values:
            object.__delattr__(holder, name)
    for name, value in values.items():
        object.__setattr__(holder, name, value)
