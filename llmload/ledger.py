"""Who made each parameter of a model that passes through many hands."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from .context import LoadContext


class Ledger:
    """Remembers for each parameter object the plugin after whose step it first appeared.

    Parameters are told apart by identity and held weakly: one that a plugin replaced is freed.
    """

    def __init__(self) -> None:
        from torch.utils.weak import WeakIdKeyDictionary

        self._maker: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def take_stock(self, plugin: str, model: nn.Module) -> None:
        """Enter the parameters not seen before as made by ``plugin``."""
        for parameter in model.parameters():
            if parameter not in self._maker:
                self._maker[parameter] = plugin

    def new(self, model: nn.Module, loader: str, ctx: LoadContext) -> dict[str, str]:
        """Return the name in ``model`` of each parameter that is new -> the plugin that made it.

        What the loader made is not new, nor what a plugin filled from the checkpoint.
        """
        return {
            name: self._maker[parameter]
            for name, parameter in model.named_parameters()
            if parameter in self._maker
            and self._maker[parameter] != loader
            and not ctx.is_from_checkpoint(parameter)
        }
