"""The adapter layer. Imported by the hook, as it imports torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from llmload.plugin import partitions


class Factors(nn.Module):
    """One factor of each expert's adapter, in one tensor."""

    def __init__(self, experts: int, rows: int, columns: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, rows, columns, device=device))

    def forward(self, x: torch.Tensor, expert_size: list[int]) -> torch.Tensor:
        """Multiply the rows of each expert by its factor."""
        parts = zip(torch.split(x, expert_size), self.weight, strict=True)
        return torch.cat([nn.functional.linear(part, factor) for part, factor in parts])


class ParallelExpertsLora(nn.Module, LoraLayer):  # type: ignore[misc]
    """Adds two factors per expert to ``(rows, in), sizes -> (rows, out)``."""

    # What PEFT's class, of which no types are known, sets or computes.
    base_layer: Any
    r: dict[str, int]
    lora_alpha: dict[str, int]
    scaling: dict[str, float]
    lora_dropout: Any
    lora_A: Any  # noqa: N815 - PEFT's name
    lora_B: Any  # noqa: N815
    active_adapters: list[str]
    merged_adapters: list[str]
    merged: bool
    disable_adapters: bool
    set_adapter: Callable[[list[str]], None]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any) -> None:
        super().__init__()
        with warnings.catch_warnings():  # of a type that PEFT does not know: that is what this is
            warnings.simplefilter("ignore", UserWarning)
            LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config.r, config.lora_alpha, config)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: Any = None, **options: Any
    ) -> None:
        """Add an adapter. PEFT calls it for every one after the first.

        :param config: of the adapter; PEFT 0.13 gives its fields as ``options`` instead.
        """
        asked = options if config is None else vars(config)
        # Under ZeRO-3 the weight is empty here, and its shape is known all the same.
        experts, out_features, in_features = partitions.shape(self.base_layer.weight)
        device = self.base_layer.weight.device
        dropout = asked["lora_dropout"]
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if asked["use_rslora"] else r)
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A[adapter_name] = Factors(experts, r, in_features, device)
        self.lora_B[adapter_name] = Factors(experts, out_features, r, device)
        self._start(adapter_name, asked["init_lora_weights"])
        self.set_adapter(self.active_adapters)

    def _start(self, adapter_name: str, how: bool | str) -> None:
        """Draw as PEFT does for a linear layer, for one expert after the other."""
        a, b = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        for factor in a.unbind():
            if how == "gaussian":
                nn.init.normal_(factor, std=1 / self.r[adapter_name])
            else:
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        if how is False:
            for factor in b.unbind():
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def forward(self, inputs: torch.Tensor, expert_size: list[int]) -> torch.Tensor:
        """Return what the experts return, and what the active adapters add to it."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: torch.Tensor = self.base_layer(inputs, expert_size)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.lora_A:
                down, up = self.lora_A[name], self.lora_B[name]
                x = self.lora_dropout[name](inputs.to(down.weight.dtype))
                added = up(down(x, expert_size), expert_size) * self.scaling[name]
                result = result + added.to(result.dtype)
        return result

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return what an adapter adds to the weight: (experts, out, in), in the weight's dtype."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        added: torch.Tensor = (b @ a * self.scaling[adapter]).to(self.base_layer.weight.dtype)
        return added

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight.

        :param adapter_names: by default the active ones; one that is merged is left out.
        :raises ValueError: with ``safe_merge``, the sum is not finite; nothing is changed.
        """
        weight = self.base_layer.weight
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name not in self.lora_A or name in self.merged_adapters:
                continue
            merged = weight + self.get_delta_weight(name)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"the adapter {name!r} makes weights that are not finite")
            weight.copy_(merged)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged adapters out of the weight again."""
        while self.merged_adapters:
            self.base_layer.weight.sub_(self.get_delta_weight(self.merged_adapters.pop()))
