"""Asks plugins for adapter layers before PEFT looks for one, and remembers who made some."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import peft
from peft.tuners.lora import LoraLayer
from torch import nn

from llmload.builtin.lora.layers import own_name
from llmload.plugin import PluginError, Problem

if TYPE_CHECKING:
    from llmload.plugin import LoadContext


@dataclasses.dataclass
class _RecordingConfig(peft.LoraConfig):  # type: ignore[misc]
    """A LoRA configuration that is saved with what PEFT does not know of the adapter."""

    llmload_plugins: dict[str, str] = dataclasses.field(default_factory=dict)
    llmload_tied_weights: str | None = None
    llmload_merged_first: list[str] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved: of ours what there is to say, as PEFT knows none of it."""
        fields: dict[str, Any] = super().to_dict()
        return {n: v for n, v in fields.items() if v or not n.startswith("llmload_")}


def record(config: peft.LoraConfig, **fields: Any) -> None:
    """Save ``fields`` with the adapter; the configuration is in the model already."""
    config.__class__ = _RecordingConfig
    defaults: dict[str, Any] = {
        "llmload_plugins": {},
        "llmload_tied_weights": None,
        "llmload_merged_first": [],
    }
    for name, value in defaults.items():
        config.__dict__.setdefault(name, value)
    for name, value in fields.items():
        setattr(config, name, value)


class Dispatcher:
    """Stands among PEFT's custom modules for the hook ``lora_layer``."""

    def __init__(self, ctx: LoadContext, config: peft.LoraConfig) -> None:
        self._ctx = ctx
        self._config = config
        self._made: list[tuple[str, nn.Module]] = []
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
        self._made += [(name, layer) for name in ([maker] if maker else self._wrapping())]
        return layer

    def _wrapping(self) -> list[str]:
        """Return the plugins that wrap the hook: one of them made a layer of nobody's."""
        hooks = self._ctx.hooks
        answering = hooks.implementing("lora_layer")
        both = hooks.implementing("lora_layer", wrappers=True)
        return [name for name in both if name not in answering]

    def finish(self, model: nn.Module) -> None:
        """Let go of the load, and write the plugins that made layers into the configuration."""
        self._config._custom_modules = None
        names = {id(module): own_name(name) for name, module in model.named_modules()}
        layers: dict[str, list[str]] = {plugin: [] for plugin, _ in self._made}
        for plugin, layer in self._made:
            layers[plugin] += [names[id(layer)]] if id(layer) in names else []
        self._ctx.record("lora", {"made_by": layers})
        if layers:
            peers = self._ctx.peers
            made = {name: peers[name].distribution for name in sorted(layers)}
            record(self._config, llmload_plugins=made)
