"""Asks plugins for adapter layers before PEFT looks for one, and remembers who made some."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import peft
from peft.tuners.lora import LoraLayer
from torch import nn

from llmload.plugin import PluginError, Problem

if TYPE_CHECKING:
    from llmload.plugin import LoadContext


@dataclasses.dataclass
class _RecordingConfig(peft.LoraConfig):  # type: ignore[misc]
    """A LoRA configuration that is saved with what PEFT does not know of the adapter."""

    llmload_plugins: list[str] = dataclasses.field(default_factory=list)
    llmload_tied_weights: str | None = None
    llmload_merged_first: list[str] = dataclasses.field(default_factory=list)


def record(config: peft.LoraConfig, **fields: Any) -> None:
    """Save ``fields`` with the adapter; the configuration is in the model already."""
    config.__class__ = _RecordingConfig
    for name in ("llmload_plugins", "llmload_tied_weights", "llmload_merged_first"):
        config.__dict__.setdefault(name, None if name == "llmload_tied_weights" else [])
    for name, value in fields.items():
        setattr(config, name, value)


class Dispatcher:
    """Stands among PEFT's custom modules for the hook ``lora_layer``."""

    def __init__(self, ctx: LoadContext, config: peft.LoraConfig) -> None:
        self._ctx = ctx
        self._config = config
        self._made: set[str] = set()
        if ctx.hooks.implementing("lora_layer", wrappers=True):
            config._register_custom_module({nn.Module: self._layer})

    def _layer(self, target: nn.Module, adapter_name: str, **options: Any) -> nn.Module | None:
        """Return the first plugin's layer, or None, whereupon PEFT goes on to its own.

        :param options: what PEFT would give to a layer of its own, by the names of its version.
        """
        config = copy.copy(self._config)
        config.r, config.lora_alpha = options["r"], options["lora_alpha"]
        maker, layer = self._ctx.hooks.first(
            "lora_layer", ctx=self._ctx, target=target, adapter_name=adapter_name, config=config
        )
        if layer is None:
            return None
        if not (isinstance(layer, LoraLayer) and isinstance(layer, nn.Module)):
            raise PluginError(
                Problem(
                    plugin=maker or "",
                    message=f"lora_layer returned a {type(layer).__name__}, and must return a"
                    " module that is a peft LoraLayer, or None",
                )
            )
        self._made.update([maker] if maker else self._wrapping())
        return layer

    def _wrapping(self) -> list[str]:
        """Return the plugins that wrap the hook: one of them made a layer of nobody's."""
        hooks = self._ctx.hooks
        answering = hooks.implementing("lora_layer")
        both = hooks.implementing("lora_layer", wrappers=True)
        return [name for name in both if name not in answering]

    def finish(self) -> None:
        """Let go of the load, and write the plugins that made layers into the configuration."""
        self._config._custom_modules = None
        if self._made:
            record(self._config, llmload_plugins=sorted(self._made))
