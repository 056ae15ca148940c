"""What quantisation leaves of a model, and what it needs while it quantises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from llmload.builtin.kbit import check
from llmload.plugin import Cost, Forecast, Weight, installed_transformers

if TYPE_CHECKING:
    from llmload.builtin.kbit.section import KbitSection
    from llmload.plugin import LoadContext

_BITS_BESIDE: Final = 0.5
"""Bits for each value that statistics take, of 4 bits in blocks of 64."""


def correct(
    ctx: LoadContext, section: KbitSection, layers: dict[str, Any], forecast: Forecast
) -> Iterator[Cost]:
    """Count codes and statistics in place of weights; yield what quantising takes meanwhile.

    :param layers: bitsandbytes' layers of the rehearsed model, by their names in the base model.
    """
    from llmload.builtin.kbit.finish import statistics_bytes

    by_id = {id(weight.parameter): weight for weight in forecast.weights.values()}
    whole: list[Weight] = []
    for path, layer in layers.items():
        weight = by_id[id(layer.weight)]
        before = forecast.replaced.pop(f"{path}.weight", None)
        if before is not None:
            weight.stored, weight.shape = before.stored, before.shape
            whole.append(before)
        weight.loaded, weight.since, weight.beside = (
            weight.itemsize,
            "load",
            statistics_bytes(layer),
        )
        weight.route, weight.by = "quantised", "kbit"
        weight.why = f"a linear layer, {section.bits} bits"
    if check.stored_quantisation(ctx) is not None:
        return
    for weight in forecast.weights.values():
        if weight.since == "load" and weight.route != "quantised":
            _cast_on_the_way(weight)
    on_device = forecast.accelerated and ctx.spec.device_map is None and not ctx.splits
    if on_device:
        for weight in forecast.weights.values():
            weight.place = "device"
    if forecast.trains:
        yield _dequantised(layers, forecast)
    yield _scratch(whole, on_device=on_device or (ctx.splits and forecast.accelerated))


def _cast_on_the_way(weight: Weight) -> None:
    if weight.loaded != weight.itemsize:
        weight.loaded, weight.route, weight.on_pages = weight.itemsize, "cast", False
        weight.why = "as the preparation asks"


def _scratch(whole: list[Weight], *, on_device: bool) -> Cost:
    """Return what the largest weight takes: its values in the model's dtype, and codes."""
    sizes = (weight.elements * weight.loaded + weight.elements // 2 for weight in whole)
    largest = max(sizes, default=0)
    place: Any = "device" if on_device else "host"
    return Cost(what="one weight while it is quantised", nbytes=largest, phase="load", place=place)


def _dequantised(layers: dict[str, Any], forecast: Forecast) -> Cost:
    """Return what a step takes of the largest weight: its values in the dtype it multiplies in."""
    sizes = [layer.in_features * layer.out_features for layer in layers.values()]
    place: Any = "device" if forecast.accelerated else "host"
    return Cost(what="one weight dequantised", nbytes=2 * max(sizes), phase="train", place=place)


def in_4_bits(ctx: LoadContext, forecast: Forecast) -> Forecast:
    """Return what would be if the linear layers had 4 bits."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    smaller = forecast.supposing()
    left = installed_transformers().modules_left_unquantised(ctx.blank)
    linear = {
        name
        for name, module in ctx.blank.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in left
    }
    for weight in smaller.weights.values():
        # Behind the name of a wrapper stands that of the module.
        parts = weight.name.replace(".base_layer", "").removesuffix(".weight").split(".")
        if any(".".join(parts[at:]) in linear for at in range(len(parts))):
            weight.beside = int(weight.elements * _BITS_BESIDE / 8)
            weight.elements, weight.itemsize, weight.loaded = weight.elements // 2, 1, 1
            weight.on_pages = False
        weight.trained = weight.trained and weight.since != "load"
    return smaller
