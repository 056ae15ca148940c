"""What ZeRO-3 takes: each rank's parts, what is gathered, and what ``initialize`` lays out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llmload.plugin import WORTH_MAPPING, Cost, Forecast, Span, Weight

if TYPE_CHECKING:
    from llmload.builtin.zero3.config import DeepSpeedConfig


def divide(forecast: Forecast, config: DeepSpeedConfig, ranks: int, *, by_us: bool) -> None:
    """Let every weight be divided among so many ranks, where and as DeepSpeed would have it.

    :param by_us: whether each rank reads its own part and nothing else.
    """
    offload: Mapping[str, Any] = config.zero.get("offload_param") or {}
    on_host = offload.get("device", "none") != "none"
    pinned = on_host and bool(offload.get("pin_memory"))
    for weight in (*forecast.weights.values(), *forecast.replaced.values()):
        weight.parts = ranks
        weight.stays = on_host
        weight.place = "device" if forecast.accelerated and not on_host else "host"
        stays = weight.place == "host" and not pinned and _is_worth_mapping(weight)
        weight.on_pages = weight.on_pages and by_us and stays
        if weight.since == "load" and weight.route in ("mapped", "copied", "cast", "assembled"):
            weight.route = "mapped part" if weight.on_pages else "part"
            weight.why = f"1 of {ranks} parts, {weight.why}"
    states: Mapping[str, Any] = config.zero.get("offload_optimizer") or {}
    forecast.states_on_host = states.get("device") == "cpu"
    forecast.in_float32 = config.dtype != "float32"


def _is_worth_mapping(weight: Weight) -> bool:
    span = Span.of(weight.elements, 0, weight.parts)
    return weight.elements % weight.parts == 0 and span.size * weight.loaded >= WORTH_MAPPING


def costs(forecast: Forecast, config: DeepSpeedConfig) -> Iterator[Cost]:
    """Yield what is gathered to be used, and DeepSpeed's buffers of a training."""
    place: Any = "device" if forecast.accelerated else "host"
    weights = list(forecast.weights.values())
    whole = [weight.elements * weight.itemsize for weight in weights]
    live = int(config.zero.get("stage3_max_live_parameters", 1e9))
    itemsize = max((weight.itemsize for weight in weights), default=2)
    gathered = min(sum(whole), max(live * itemsize, max(whole, default=0)))
    for phase in ("use", "train"):
        yield Cost(what="gathered weights", nbytes=gathered, phase=phase, place=place)
    if forecast.trains:
        yield from _of_gradients([w for w in weights if w.trained], forecast, config, place)


def _of_gradients(
    trained: list[Weight], forecast: Forecast, config: DeepSpeedConfig, place: Any
) -> Iterator[Cost]:
    """Yield the bucket of gradients that go to their ranks together, and copies for the optimizer.

    Those of a sub-group of parts are laid out in one piece, and then in the optimizer's dtype.
    """
    itemsize = max(weight.itemsize for weight in trained)
    elements = sum(weight.elements for weight in trained)
    if config.zero.get("contiguous_gradients", True):
        bucket = min(elements, int(config.zero.get("reduce_bucket_size", 5e8))) * itemsize
        what = "gradients on their way"
        yield Cost(what=what, nbytes=bucket, phase="train", lasting=True, place=place)
    part = sum(Span.of(weight.elements, 0, weight.parts).size for weight in trained)
    what = "gradients in the optimizer's dtype"
    wide = 4 if forecast.in_float32 else 0
    if forecast.states_on_host:
        yield Cost(what=what, nbytes=part * wide, phase="train", lasting=True)
    else:
        group = min(part, int(config.zero.get("sub_group_size", 1e9)))
        yield Cost(what=what, nbytes=group * (itemsize + wide), phase="train", place=place)
