"""A layer that PEFT does not know, and plugins that put it into a Llama and adapt it."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

import llmload


class OddLinear(nn.Module):
    """Multiplies by a weight of shape (out, in), as ``nn.Linear`` does, and is none."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class OddLora(nn.Module, LoraLayer):
    """Its adapter: the same two factors as PEFT's."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.lora_alpha / config.r
        self.lora_A[adapter_name] = nn.Linear(base_layer.in_features, config.r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(config.r, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B[adapter_name].weight)
        self.set_adapter(self.active_adapters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base_layer(x)
        for name in self.active_adapters:
            result = result + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return result


class MakesOdd:
    """Replaces the second layer of every feed-forward block."""

    name = "makes_odd"
    before = ("lora",)

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        for layer in model.model.layers:
            layer.mlp.down_proj = OddLinear(layer.mlp.down_proj)
        return model


class Adapts:
    """Adapts one type of module."""

    def __init__(self, kind: type[nn.Module] = OddLinear, name: str = "adapts") -> None:
        self.kind, self.name = kind, name

    @llmload.hookimpl
    def lora_layer(self, target: nn.Module, adapter_name: str, config: Any) -> Any:
        return OddLora(target, adapter_name, config) if isinstance(target, self.kind) else None
