"""The layers that carry an adapter, and what of it each of them holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peft.tuners.lora import LoraLayer
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel


def lora_layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """Return the layers that carry ``adapter``, by their names in the base model."""
    return {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and adapter in module.r
    }


def adapter_parameters(layer: LoraLayer, adapter: str) -> dict[str, nn.Parameter]:
    """Return one layer's parameters of ``adapter``, by the name of what holds them."""
    found = {}
    for kind in layer.adapter_layer_names:
        holder = getattr(layer, kind)
        if adapter not in holder:
            continue
        held = holder[adapter]
        if isinstance(held, nn.Parameter):
            found[kind] = held
        else:
            found |= {f"{kind}.{name}": parameter for name, parameter in held.named_parameters()}
    return found


def token_wrappers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield PEFT's wrappers of modules of which single rows are trained; they came with 0.15."""
    for name, module in model.named_modules():
        if hasattr(module, "token_adapter"):
            yield name, module


def merged_into(model: PeftModel, adapter: str) -> Iterator[nn.Parameter]:
    """Yield the parameters of the base that a merge of the adapter changes."""
    for layer in lora_layers(model, adapter).values():
        base = layer.get_base_layer()
        # PEFT's layer around one parameter of a module, such as merged experts, knows its name.
        yield getattr(base, getattr(layer, "parameter_name", "weight"))
        if getattr(layer, "lora_bias", {}).get(adapter):
            yield base.bias
    for _, wrapper in token_wrappers(model):
        yield wrapper.token_adapter.get_base_layer().weight


def own_name(name: str) -> str:
    """Return the name that a module or parameter has without the adapter's layers around it."""
    return re.sub(
        r"\.(base_layer|token_adapter|original_module|modules_to_save\.[^.]+)(?=\.|$)",
        "",
        name.removeprefix("base_model.model."),
    )
