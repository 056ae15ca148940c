"""Imported by a hook, as it imports torch."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from torch import nn


class PastLora(nn.Module, LoraLayer):
    """Two factors, as PEFT's."""

    def __init__(self, base_layer, adapter_name, config):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.lora_alpha / config.r
        self.lora_A[adapter_name] = nn.Linear(base_layer.in_features, config.r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(config.r, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B[adapter_name].weight)
        self.set_adapter(self.active_adapters)

    def forward(self, x):
        result = self.base_layer(x)
        for name in self.active_adapters:
            result = result + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return result
