"""The layers: PEFT sees LoRA layers of its own kind, and their arithmetic is ColossalChat's.

Imported by functions only: this module needs torch and peft.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from llmload.plugin import partitions

_FAULTY_ALPHA: Final = 32
"""ColossalChat hands on only rank and initialisation to a linear layer; this is its default."""


def layer_for(
    target: nn.Module, adapter_name: str, config: Any, *, faults: bool
) -> CoatiLayer | None:
    """Return the layer that takes the place of ``target``, or None where there is none for it."""
    kind: type[CoatiLayer]
    if isinstance(target, nn.Linear) and type(target).forward is nn.Linear.forward:
        kind = CoatiLinear
        if config.bias != "none" and target._parameters["bias"] is None:
            target.bias = nn.Parameter(target.weight.new_zeros(target.out_features))
        elif config.bias == "none" and faults:
            target.register_parameter("bias", None)
    elif isinstance(target, nn.Embedding) and type(target).forward is nn.Embedding.forward:
        kind = CoatiEmbedding
    else:
        return None
    alpha, dropout = config.lora_alpha, config.lora_dropout
    if faults and kind is CoatiLinear:
        alpha, dropout = _FAULTY_ALPHA, 0.0
    return kind(
        target,
        adapter_name,
        r=config.r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        init_lora_weights=config.init_lora_weights,
    )


class CoatiLayer(nn.Module, LoraLayer):  # type: ignore[misc]
    """What both kinds share: factors A (r, in) and B (out, r), float32, by adapter.

    Unlike ColossalChat's, ``eval()`` merges nothing, and ``train()`` after it works; PEFT's
    ``merge_and_unload`` merges.
    """

    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout")

    # What PEFT's classes, of which no types are known, set or compute.
    weight: torch.Tensor
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[[list[str]], None]
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    lora_dropout: nn.ModuleDict
    lora_A: nn.ParameterDict  # noqa: N815 - PEFT's and ColossalChat's name
    lora_B: nn.ParameterDict  # noqa: N815
    base_layer: nn.Module
    in_features: int
    out_features: int
    merged: bool
    merged_adapters: list[str]
    disable_adapters: bool
    active_adapters: list[str]

    def __init__(self, target: nn.Module, adapter_name: str, **options: Any) -> None:
        super().__init__()
        LoraLayer.__init__(self, target)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **options)

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        init_lora_weights: bool | str,
    ) -> None:
        """Add an adapter of rank ``r``, whose output is scaled by ``lora_alpha / r``."""
        device = self.weight.device
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / r
        self.lora_dropout[adapter_name] = nn.Dropout(lora_dropout)
        # float32 under any default dtype.
        a = torch.empty(r, self.in_features, device=device, dtype=torch.float32)
        b = torch.empty(self.out_features, r, device=device, dtype=torch.float32)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = nn.Parameter(a), nn.Parameter(b)
        self._start(adapter_name, init_lora_weights)
        self.set_adapter(self.active_adapters)

    def _start(self, adapter: str, how: bool | str) -> None:
        raise NotImplementedError

    def _delta(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """Return the adapter's part of the output, unscaled, in the factors' dtype."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return what the adapter adds to the base's weight, of its shape, in float32."""
        a, b = self.lora_A[adapter], self.lora_B[adapter]
        delta: torch.Tensor = b.float() @ a.float() * self.scaling[adapter]
        return delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base's weight.

        :raises ValueError: with ``safe_merge``, where the merged weight is not finite.
        """
        weight = self.weight
        for adapter in check_adapters_to_merge(self, adapter_names):
            merged = weight.data + self.get_delta_weight(adapter)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"the weight merged with the adapter {adapter!r} is not finite")
            weight.data = merged.to(weight.dtype)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take the merged adapters off the base's weight again."""
        weight = self.weight
        while self.merged_adapters:
            merged = weight.data - self.get_delta_weight(self.merged_adapters.pop())
            weight.data = merged.to(weight.dtype)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the base's output plus ``scaling`` times each active adapter's, in its dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                result = result + self._delta(x, adapter) * self.scaling[adapter]
        # ColossalChat needs autocast where the base is not float32: its factors always are.
        return result.to(dtype)


class CoatiLinear(CoatiLayer):
    """A linear layer: A starts by kaiming_uniform and B at zero, or both by PiSSA."""

    def _start(self, adapter: str, how: bool | str) -> None:
        if isinstance(how, str) and not self.weight.is_meta:
            with partitions.whole([self.weight]):
                self._take_from_base(adapter)
            return
        nn.init.kaiming_uniform_(self.lora_A[adapter], a=math.sqrt(5))
        nn.init.zeros_(self.lora_B[adapter])

    def _take_from_base(self, adapter: str) -> None:
        """PiSSA (arXiv 2404.02948): the largest singular parts move from the base into A and B."""
        weight, scaling = self.weight, self.scaling[adapter]
        u, s, v = torch.svd_lowrank(weight.detach().float(), self.r[adapter], niter=4)
        root = (s / scaling).sqrt()
        self.lora_A[adapter].data = (root[:, None] * v.t()).contiguous()
        self.lora_B[adapter].data = u * root
        residual = weight.detach().float() - self.get_delta_weight(adapter).detach()
        weight.data = residual.to(weight.dtype)

    def _delta(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        a, b = self.lora_A[adapter], self.lora_B[adapter]
        delta: torch.Tensor = self.lora_dropout[adapter](x.to(a.dtype)) @ a.t() @ b.t()
        return delta


class CoatiEmbedding(CoatiLayer):
    """An embedding: A (r, tokens) starts at zero, B (width, r) at random; nothing drops out."""

    def _start(self, adapter: str, how: bool | str) -> None:
        nn.init.zeros_(self.lora_A[adapter])
        nn.init.normal_(self.lora_B[adapter])

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return what the adapter adds to the base's weight, of shape (tokens, width)."""
        return super().get_delta_weight(adapter).t()

    def _delta(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        padding = getattr(self.get_base_layer(), "padding_idx", None)  # its row learns nothing
        low = nn.functional.embedding(x, self.lora_A[adapter].t(), padding_idx=padding)
        delta: torch.Tensor = low @ self.lora_B[adapter].t()
        return delta
