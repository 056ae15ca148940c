"""Who made each parameter of a model that passes through many hands."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from llmload.context.context import LoadContext


class Ledger:
    """Remembers for each parameter object the plugin after whose step it first appeared.

    Parameters are told apart by identity and held weakly: one that a plugin replaced is freed.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[nn.Parameter], str]] = {}

    def take_stock(self, plugin: str, model: nn.Module) -> None:
        """Enter the parameters not seen before as made by ``plugin``."""
        for parameter in model.parameters():
            if self._maker(parameter) is None:
                self._entries[id(parameter)] = weakref.ref(parameter), plugin

    def _maker(self, parameter: nn.Parameter) -> str | None:
        known, plugin = self._entries.get(id(parameter), (None, None))
        # Another object may have come to lie where one was that is gone.
        return plugin if known is not None and known() is parameter else None

    def new(self, model: nn.Module, loader: str, ctx: LoadContext) -> dict[str, str]:
        """Return the name in ``model`` of each parameter that is new -> the plugin that made it.

        What the loader made is not new, nor what a plugin filled from the checkpoint.
        """
        if all(maker == loader for _, maker in self._entries.values()):
            return {}
        return {
            name: maker
            for name, parameter in model.named_parameters()
            if (maker := self._maker(parameter)) is not None
            and maker != loader
            and not ctx.is_from_checkpoint(parameter)
        }
