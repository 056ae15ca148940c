"""Every tensor that a model can reach: parameters, buffers, and what it keeps in other places.

Models keep tensors as plain attributes, in lists and dicts, in objects of their own, in closures of
their hooks and in containers of their classes. ``state_dict`` and ``named_buffers`` know none of
them, and each of them can be on the meta device, uninitialised, or changed by a forward.

The code of a model keeps some too: in globals of its modules, in defaults of arguments and in
``functools.lru_cache``. They belong to every model of that code, and are looked at only where
something is to be as it was afterwards.

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

from llmload.model import holders

Visit = Callable[[str, torch.Tensor], torch.Tensor]
"""Takes a tensor's path and the tensor; returns what is to be in its place, most often itself."""

_PLAIN = frozenset(
    {int, float, complex, str, bytes, bool, type(None)}
    | {torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format}
)
"""Types of values that hold nothing. Asked for by identity: most of what there is are these."""
_EMPTY = frozenset((dict, OrderedDict, list, tuple, set))
_OPAQUE = (
    types.ModuleType,
    types.BuiltinFunctionType,
    torch.autograd.graph.Node,
)
"""Objects that keep no tensor of a model, and have much else inside."""


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

    walk = _Walk(note)
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


def replace_tensors(model: nn.Module, visit: Visit, *, code: bool = False) -> None:
    """Put what ``visit`` returns in the place of each tensor that a model can reach.

    :param code: those too that its code keeps, and a copy in the place of each iterator: what takes
        from it cannot give back.
    """
    _Walk(visit, code=code, copy_iterators=code).value("", model)


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Restore afterwards what everything that a model can reach consists of, its code included.

    Entries of modules, dicts, lists, sets, objects, closures, namespaces and of the classes' own
    containers are put back, those that came anew are removed; generators of random numbers and
    NumPy's arrays get their state back, and caches that took something in are emptied. What is
    inside a tensor is not looked at.
    """
    restore: list[Callable[[], Any]] = []
    empty: list[Any] = []

    def take(holder: Any) -> None:
        if type(holder) in _EMPTY and not holder:  # most of what a module has, such as its hooks
            empty.append(holder)
        else:
            restore.append(holders.contents(holder))

    _Walk(lambda path, tensor: tensor, take, code=True).value("", model)
    try:
        yield
    finally:
        for holder in empty:
            if holder:
                holder.clear()
        for put_back in restore:
            put_back()


class Surroundings:
    """What the code of a class keeps outside of every model, as it was before one is built.

    Built on the meta device, a model leaves tensors there that have no values: in a cache from
    which the next model, or the first real forward, takes them.
    """

    def __init__(self, owner: type) -> None:
        self._restore: list[tuple[Any, Callable[[], Any]]] = []
        _Walk(lambda path, tensor: tensor, self._take, code=True).value("", owner)

    def _take(self, holder: Any) -> None:
        self._restore.append((holder, holders.contents(holder)))

    def put_back_what_has_no_values(self) -> None:
        """Put back what has tensors on the meta device, and empty caches that took something in."""
        for holder, put_back in self._restore:
            if holders.may_hold_meta(holder):
                put_back()


def _is_plain_iterator(value: Any) -> bool:
    return type(value).__module__ in ("builtins", "itertools") and isinstance(value, Iterator)


def _pass_by(holder: Any) -> None:
    """Nobody wants to know what holds others."""


class _Walk:
    """Goes through all that a model can reach, each object once.

    :param enter: is given each object that holds others and can change, before what is in it.
    :param code: go through what the code keeps, too.
    :param copy_iterators: put a copy in the place of each iterator that can be copied.
    """

    def __init__(
        self,
        visit: Visit,
        enter: Callable[[Any], None] | None = None,
        *,
        code: bool = False,
        copy_iterators: bool = False,
    ) -> None:
        self._visit = visit
        self._notes = enter is not None
        self._enter = enter or _pass_by
        self._code = code
        self._copy_iterators = copy_iterators
        self._copies: dict[int, Any] = {}
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
        if self._copy_iterators and _is_plain_iterator(value):
            return self._copied(value)
        if id(value) not in self._seen:
            self._seen[id(value)] = value  # kept, so that no other object has its id
            if isinstance(value, nn.Module):
                self._module(path, value)
            elif holders.has_state(value):
                self._enter(value)
            elif not (isinstance(value, _OPAQUE) or self._is_config(value)):
                self._inside(path, value)
        return value

    def _copied(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Return a copy that goes on from here; of one that cannot be copied, itself.

        A copy by ``copy`` would take from the same iterators below, as ``itertools.cycle`` has one.
        """
        if id(iterator) not in self._copies:
            self._seen[id(iterator)] = copied = iterator
            with suppress(Exception):  # a generator cannot
                reduced: Any = iterator.__reduce__()
                made, arguments, *state = reduced
                below = [self._copied(a) if _is_plain_iterator(a) else a for a in arguments]
                copied = made(*below)
                if state:
                    copied.__setstate__(*state)
            self._copies[id(iterator)] = copied
        found: Iterator[Any] = self._copies[id(iterator)]
        return found

    def _is_config(self, value: Any) -> bool:
        return hasattr(value, "to_diff_dict") and not self._code

    def _rebuilt(self, path: str, value: Any) -> Any:
        items = [self.value(f"{path}[{at}]", item) for at, item in enumerate(value)]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

    def _inside(self, path: str, value: Any) -> None:
        if isinstance(value, dict | list | deque | set):
            self._container(path, value)
        elif isinstance(value, types.FunctionType):
            self._function(path, value)
        elif isinstance(value, types.MethodType):
            self.value(path, value.__self__)
            self.value(path, value.__func__)
        elif isinstance(value, functools.partial):
            self._partial(path, value)
        elif isinstance(value, holders.LRU_CACHE):
            self._enter(value)
            self.value(path, value.__wrapped__)
        elif isinstance(value, type):
            self._class(path, value)
        else:
            self._object(path, value)

    def _container(self, path: str, value: Any) -> None:
        if isinstance(value, dict):
            self._entries(path, value, "[{}]")
        elif isinstance(value, set):
            self._enter(value)
            new = {self.value(f"{path}[{at}]", item) for at, item in enumerate(value)}
            if {*map(id, new)} != {*map(id, value)}:
                value.clear()
                value.update(new)
        else:
            self._enter(value)
            for at, item in enumerate(value):
                new = self.value(f"{path}[{at}]", item)
                if new is not item:
                    value[at] = new
        if type(value) not in _EMPTY and type(value) is not deque:  # attributes of its own
            self._object(path, value)

    def _partial(self, path: str, value: functools.partial[Any]) -> None:
        self._enter(value)
        old = (value.func, value.args, value.keywords)
        new = tuple(self.value(path, part) for part in old)
        if any(one is not other for one, other in zip(new, old, strict=True)):
            value.__setstate__((*new, vars(value)))  # type: ignore[attr-defined]

    def _module(self, path: str, module: nn.Module) -> None:
        attributes = vars(module)
        self._enter(attributes)
        dotted = f"{path}." if path else ""
        for name, value in attributes.items():
            kind = type(value)
            if kind in _PLAIN:
                continue
            if kind in _EMPTY and not value:
                # What comes into an empty one is to be taken out of it again.
                if self._notes and kind is not tuple:
                    self._enter(value)
            elif name in ("_parameters", "_buffers", "_modules"):
                self._entries(dotted, value, "{}")
            elif name.endswith("_hooks") and isinstance(value, dict):
                # Its keys count all hooks that there ever were.
                self._entries(dotted + name, value, "[{}]", numbered=True)
            else:
                new = self.value(dotted + name, value)
                if new is not value:
                    attributes[name] = new
        if type(module) not in self._classes:
            self._class(path, type(module))

    def _entries(
        self, path: str, holder: dict[Any, Any], key: str, *, numbered: bool = False
    ) -> None:
        self._enter(holder)
        for at, (name, value) in enumerate(holder.items()):
            if type(value) in _PLAIN:
                continue
            # A path is the same for every model of one class: no address of an object is in it.
            label = name if type(name) in _PLAIN and not numbered else at
            new = self.value(path + key.format(label), value)
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
        of_user = self._code and not holders.is_of_a_library(function)
        if vars(function) or of_user:
            self._entries(path, vars(function), ".{}")
        self._defaults(f"{path}.defaults", function)
        if of_user:
            self._globals(function)

    def _defaults(self, path: str, function: types.FunctionType) -> None:
        if function.__kwdefaults__:
            self._entries(path, function.__kwdefaults__, "[{}]")
        if function.__defaults__:
            self._enter(function)
            new = self.value(path, function.__defaults__)
            if new is not function.__defaults__:
                function.__defaults__ = new

    def _globals(self, function: types.FunctionType) -> None:
        """Go through what a function's code names, in its module and in others of the user's."""
        names = holders.names_in(function.__code__)
        spaces = [(function.__module__, function.__globals__)]
        for name in names & function.__globals__.keys():
            module = function.__globals__[name]
            if isinstance(module, types.ModuleType) and not holders.is_foreign(module, function):
                spaces.append((module.__name__, vars(module)))
        for path, space in spaces:
            self._enter(holders.Names(space, sorted(names & space.keys())))
            for name in names & space.keys():
                value = space[name]
                if holders.is_looked_into(value, function):
                    new = self.value(f"{path}.{name}", value)
                    if new is not value:
                        space[name] = new

    def _class(self, path: str, owner: type) -> None:
        # Once for each class, however many modules are of it: a model has hundreds of a kind.
        for base in owner.__mro__:
            if base in self._classes:
                continue
            self._classes.add(base)
            if holders.is_of_a_library(base):
                continue
            self._enter(base)
            for name, value in list(vars(base).items()):
                if isinstance(value, torch.Tensor | list | dict | set | deque):
                    if name.startswith("__"):
                        continue
                    new = self.value(f"{path}.{name}", value)
                    if new is not value:
                        setattr(base, name, new)
                elif self._code:
                    for function in holders.functions_in(value):
                        self.value(f"{path}.{name}", function)

    def _object(self, path: str, value: Any) -> None:
        entries = getattr(value, "__dict__", None)
        if isinstance(entries, dict):
            self._entries(path, entries, ".{}")
        slots = list(holders.slots(value))
        if slots:
            self._enter(value)
        for name in slots:
            content = getattr(value, name)
            new = self.value(f"{path}.{name}", content)
            if new is not content:
                object.__setattr__(value, name, new)
        if self._code:
            self._class(path, type(value))
