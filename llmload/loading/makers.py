"""What hooks say of single parameters, followed to the finished model, and who made each.

The one owner of ``newly_initialised``, ``changed_base`` and ``merged_into``: hooks state, and
nobody renames.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmload.context.context import LoadContext


@dataclass(slots=True)
class _Stated:
    """A parameter or buffer of which a hook said something."""

    name: str
    """In the model as it was last seen."""
    tensor: weakref.ref[torch.Tensor] | None
    """None for a name that the model never had, which is reported as it was said."""
    why: str
    plugin: str
    """Who said it."""


class Ledger:
    """Follows parameters and buffers through the hands that a model passes through.

    They are told apart by identity and held weakly: one that a plugin replaced is freed. Hooks
    state names in ``ctx.newly_initialised``, ``ctx.changed_base`` and ``ctx.merged_into``, as they
    are in the model that they return; from then on it is the tensor that counts, so that whoever
    wraps the model has nothing to rename.
    """

    def __init__(self, ctx: LoadContext) -> None:
        self._ctx = ctx
        self._makers: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}
        self._new: list[_Stated] = []
        self._changed: list[_Stated] = []
        self._merged: list[_Stated] = []

    def take_stock(self, plugin: str, model: nn.Module) -> None:
        """Enter what a plugin made and what it said, after each of its steps.

        Parameters not seen before are made by ``plugin``; what was stated is taken out
        of the context.
        """
        for parameter in model.parameters():
            if self._maker(parameter) is None:
                self._makers[id(parameter)] = weakref.ref(parameter), plugin
        self._new = _taken(self._new, self._ctx.newly_initialised, model, plugin)
        self._changed = _taken(self._changed, self._ctx.changed_base, model, plugin)
        self._merged = _taken(self._merged, self._ctx.merged_into, model, plugin)

    def follow(self, moved: Mapping[int, torch.Tensor]) -> None:
        """Go on with what took the place of parameters and buffers, by their identities."""
        # All at once: a new object may have come to lie where an old one was.
        self._makers |= {
            id(tensor): (weakref.ref(tensor), self._makers[key][1])
            for key, tensor in moved.items()
            if key in self._makers
        }
        filled = self._ctx.records.filled
        filled |= {id(moved[key]): moved[key] for key in filled if key in moved}

    def _maker(self, parameter: nn.Parameter) -> str | None:
        known, plugin = self._makers.get(id(parameter), (None, None))
        # Another object may have come to lie where one was that is gone.
        return plugin if known is not None and known() is parameter else None

    def made(self, model: nn.Module, loader: str) -> dict[str, str]:
        """Return the name in ``model`` of each parameter that is new -> the plugin that made it.

        What the loader made is not new, nor what a plugin filled from the checkpoint.
        """
        if all(maker == loader for _, maker in self._makers.values()):
            return {}
        return {
            name: maker
            for name, parameter in model.named_parameters()
            if (maker := self._maker(parameter)) is not None
            and maker != loader
            and not self._ctx.is_from_checkpoint(parameter)
        }

    def foretold(self, model: nn.Module, loader: str) -> dict[str, str]:
        """Return the name in ``model`` of each parameter that a plugin makes, or of which it says
        that its value is new -> the plugin."""
        names = {name for name, _ in model.named_parameters()} if self._new else set()
        stated = {stated.name: stated.plugin for stated in self._new if stated.name in names}
        return stated | self.made(model, loader)

    def newly_initialised(self, model: nn.Module, loader: str) -> dict[str, str]:
        """Return all that is new in the finished model -> why, or by whom where nobody said."""
        return self.made(model, loader) | {stated.name: stated.why for stated in self._new}

    def changed_base(self) -> dict[str, str]:
        """Return what of the finished model hooks changed for an adapter's sake -> what did it."""
        return {stated.name: stated.why for stated in self._changed}

    def merged_into(self) -> dict[str, str]:
        """Return what of the finished model hooks wrote to for good -> what did it."""
        return {stated.name: stated.why for stated in self._merged}


def _taken(
    before: list[_Stated], new: dict[str, str], model: nn.Module, plugin: str
) -> list[_Stated]:
    """Return what was stated before and what is stated now, by the names in ``model``.

    ``new`` is emptied.
    """
    if not before and not new:
        return before
    tensors = dict(named(model))
    stated = list(_followed(before, tensors))
    for name, why in new.items():
        tensor = tensors.get(name)
        seen = None if tensor is None else weakref.ref(tensor)
        stated.append(_Stated(name, seen, why, plugin))
    new.clear()
    return stated


def _followed(before: list[_Stated], tensors: dict[str, torch.Tensor]) -> Iterator[_Stated]:
    """Yield what was stated before under the names that it has now; what is gone is left out.

    Where another tensor took the place of one, it is meant from then on.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    for stated in before:
        alive = None if stated.tensor is None else stated.tensor()
        found = [] if alive is None else names.get(id(alive), [])
        if found:
            # Of tied names the one that only became longer.
            longer = (n for n in found if f".{n}".endswith(f".{stated.name}"))
            stated.name = next(longer, found[0])
        elif stated.tensor is not None and stated.name in tensors:
            stated.tensor = weakref.ref(tensors[stated.name])
        elif stated.tensor is not None:
            continue
        yield stated


def named(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and buffers, tied ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
