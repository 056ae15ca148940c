"""Once the weights are there: freeze, cast, say what it all takes, prove a piece. Needs torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmload.builtin.kbit import check
from llmload.builtin.kbit.casting import Casting, is_quantised, parameters
from llmload.builtin.kbit.quantise import quantised_layers, rehearse
from llmload.plugin import (
    CheckpointError,
    Problem,
    RequestError,
    dtype_name,
    partitions,
    size_text,
    some,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmload.builtin.kbit.quantise import QuantisedLayer
    from llmload.builtin.kbit.section import KbitSection
    from llmload.plugin import LoadContext


def finish(ctx: LoadContext, section: KbitSection, model: PreTrainedModel) -> None:
    """Freeze the base model, cast what is not quantised, and record what it takes.

    :raises RequestError: nothing is quantised; the block size is not as asked; the model is to be
        sharded by FSDP, and its parameters would not have one dtype; or ZeRO-3 partitions it, and
        parameters would be cast.
    :raises CheckpointError: a weight to be quantised is missing from the checkpoint.
    """
    if ctx.rehearsing:
        rehearse(ctx, section, model)
    layers = dict(quantised_layers(model))
    if ctx.rehearsing:
        ctx.handed_on["kbit"] = layers
    _refuse_unquantised(ctx, section, model, layers)
    casting = Casting(section, model)
    if ctx.one_dtype:
        _refuse_casts(ctx, casting, model)
    for name, owner, parameter in parameters(model):
        parameter.requires_grad = False
        parameter.data = parameter.data.to(casting.dtype(name, owner, parameter))
    if check.fsdp_announced() and not ctx.splits:
        _refuse_mixed_dtypes(casting, model)
    facts = _facts(ctx, casting, model, layers)
    ctx.record("kbit", facts)
    if ctx.rehearsing:
        for line in _lines(ctx, facts):
            ctx.show("kbit", "k-bit", line)


def _refuse_unquantised(
    ctx: LoadContext, section: KbitSection, model: nn.Module, layers: dict[str, QuantisedLayer]
) -> None:
    if not layers:
        raise RequestError(
            f"{type(model).__name__} has no linear layer to quantise",
            fix="Remove `kbit`, or list fewer `skip_modules`.",
            where="kbit",
        )
    missing = (
        _foretold_missing(ctx, layers)
        if ctx.rehearsing
        else [f"{n}.weight" for n, layer in layers.items() if not _is_done(layer.weight)]
    )
    if missing:
        raise CheckpointError(
            f"the checkpoint has no values for {some(missing)}, and bitsandbytes cannot"
            " quantise newly initialised ones",
            fix="List the modules in `kbit: {skip_modules: [...]}`.",
            where="kbit",
        )
    in_4_bits = [layer for layer in layers.values() if isinstance(layer, Linear4bit)]
    blocks = (
        _foretold_blocks(ctx, section, in_4_bits)
        if ctx.rehearsing
        else {layer.weight.quant_state.blocksize for layer in in_4_bits}
    )
    if check.stored_quantisation(ctx) is None and blocks - {section.block_size}:
        raise RequestError(
            f"{section.block_size} is asked for, and from_pretrained, which had to load"
            f" this model, quantises in blocks of {min(blocks)}",
            fix="Remove the key; the plan says why the streaming loader declined.",
            where="kbit.block_size",
        )


def _foretold_missing(ctx: LoadContext, layers: dict[str, QuantisedLayer]) -> list[str]:
    """Return the weights to be quantised that the checkpoint lacks and ``strict`` lets pass."""
    if ctx.accounted is None or check.stored_quantisation(ctx) is not None:
        return []
    allows = ctx.spec.key_exceptions.allows_missing
    lost = {n for n in ctx.accounted.missing if n in ctx.to_initialise or allows(n)}
    lost.update(ctx.accounted.excused)
    return [name for name in (f"{path}.weight" for path in layers) if name in lost]


def _foretold_blocks(
    ctx: LoadContext, section: KbitSection, in_4_bits: list[Linear4bit]
) -> set[int]:
    """Return the block sizes that the loader will use: bitsandbytes' own where none asks us."""
    if not in_4_bits or any(name not in ctx.declined for name in ctx.providing("placement")):
        return {section.block_size} if in_4_bits else set()
    return {Params4bit(torch.empty(0, device="meta"), requires_grad=False).blocksize}


def _is_done(weight: nn.Parameter) -> bool:
    return is_quantised(weight) and (
        weight.dtype == torch.int8 or bool(getattr(weight, "bnb_quantized", False))
    )


def _refuse_casts(ctx: LoadContext, casting: Casting, model: nn.Module) -> None:
    """ZeRO-3 has one dtype for every parameter of floating point, DeepSpeed's own."""
    groups = {
        casting.group(name, owner)
        for name, owner, parameter in parameters(model)
        if casting.dtype(name, owner, parameter) != parameter.dtype
    }
    if groups:
        raise RequestError(
            f"ZeRO-3 keeps every parameter in {dtype_name(ctx.dtype)},"
            f" and {' and '.join(sorted(groups))} would be cast to another dtype",
            fix="Leave `prepare` and `cast` out, or use a ZeRO stage below 3.",
            where="kbit",
        )


def _refuse_mixed_dtypes(casting: Casting, model: nn.Module) -> None:
    """FSDP flattens the parameters of a block into one tensor: they must have one dtype."""
    found: dict[torch.dtype, set[str]] = {}
    for name, owner, parameter in parameters(model):
        what = "codes" if is_quantised(parameter) else casting.group(name, owner)
        found.setdefault(parameter.dtype, set()).add(what)
    if len(found) > 1 or not next(iter(found)).is_floating_point:
        listed = ", ".join(
            f"{' and '.join(sorted(groups))} in {dtype_name(dtype)}"
            for dtype, groups in sorted(found.items(), key=str)
        )
        raise RequestError(
            "FSDP shards parameters of one floating-point dtype, and the model would"
            f" have {listed}",
            fix="Leave `quant_storage`, `prepare` and `cast` out.",
            where="kbit",
        )


def say_of_cache(ctx: LoadContext) -> None:
    """Say where another loader has quantised, which asks no placement."""
    if "cache" not in ctx.facts.get("kbit", {}):
        text = "the quantised weights are not kept: the streaming loader did not load the model"
        ctx.record("kbit", {"cache": {"outcome": "not kept", "why": text}})
        ctx.show("kbit", "cache", text)


def _facts(
    ctx: LoadContext, casting: Casting, model: nn.Module, layers: dict[str, QuantisedLayer]
) -> dict[str, Any]:
    left: dict[str, dict[str, int]] = {}
    for name, owner, parameter in parameters(model):
        if not is_quantised(parameter):
            group = left.setdefault(
                casting.group(name, owner), {"parameters": 0, "bytes": 0, "cast_bytes": 0}
            )
            elements = partitions.elements(parameter)
            group["parameters"] += elements
            group["bytes"] += elements * parameter.element_size()
            group["cast_bytes"] += elements * (parameter.element_size() - ctx.dtype.itemsize)
    return {
        "layers": len(layers),
        "parameters": sum(layer.in_features * layer.out_features for layer in layers.values()),
        "bytes": sum(map(_code_bytes, layers.values())),
        "statistics_bytes": sum(map(statistics_bytes, layers.values())),
        "unquantised": left,
    }


def _lines(ctx: LoadContext, facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the codes take, and what each group of the other parameters takes and why."""
    yield (
        f"{facts['parameters']:,} values in {size_text(facts['bytes'])}, and"
        f" {size_text(facts['statistics_bytes'])} of statistics"
    )
    for group, takes in facts["unquantised"].items():
        cast = takes["cast_bytes"]
        line = f"{group}: {takes['parameters']:,} values in {size_text(takes['bytes'])}"
        if cast:
            change = "more" if cast > 0 else "less"
            dtype = dtype_name(ctx.dtype)
            line += f", {size_text(abs(cast))} {change} than in {dtype}"
        yield line


def _code_bytes(layer: QuantisedLayer) -> int:
    size: int = layer.weight.element_size()
    return partitions.elements(layer.weight) * size


def statistics_bytes(layer: QuantisedLayer) -> int:
    """Count what a layer keeps beside its codes, constant tables apart."""
    weight = layer.weight
    if isinstance(weight, Int8Params):
        return 4 * int(layer.out_features)
    blocks: int = math.ceil(layer.in_features * layer.out_features / weight.blocksize)
    if not weight.compress_statistics:
        return 4 * blocks
    # One byte each, in blocks of 256 with a float32, and their mean.
    return blocks + 4 * math.ceil(blocks / 256) + 4


# --- the proof ----------------------------------------------------------------------------------


def audit(ctx: LoadContext, model: nn.Module) -> Iterator[Problem]:
    """Quantise the first block or row held of each weight anew from the file, and compare.

    Of weights that the checkpoint holds under the model's own name and shape.
    """
    checkpoint = ctx.checkpoint
    if (
        checkpoint is None
        or checkpoint.format != "safetensors"
        or check.stored_quantisation(ctx) is not None
    ):
        return
    from safetensors import safe_open

    get_base_model = getattr(model, "get_base_model", lambda: model)
    finished = {layer: path for path, layer in quantised_layers(model)}
    proven, wrong = 0, []
    opened: dict[Any, Any] = {}
    for path, layer in quantised_layers(get_base_model()):
        name = f"{path.removesuffix('.base_layer')}.weight"
        info = checkpoint.tensors.get(name)
        shape = (layer.out_features, layer.in_features)
        if f"{finished[layer]}.weight" in ctx.changed_base:
            continue  # an initialisation took its part out
        if info is None or info.shape != (shape[::-1] if _is_transposed(layer) else shape):
            continue
        proven += 1
        if info.file not in opened:  # once: its header may list thousands of tensors
            opened[info.file] = safe_open(info.file, "pt")
        if not _agrees(layer, opened[info.file], name, ctx.dtype):
            wrong.append(name)
    ctx.record("kbit", {"proven_layers": proven})
    if wrong:
        yield Problem(
            where="kbit",
            message=f"{some(wrong)} are not what the checkpoint's values give when quantised",
            fix="Try another loader with `-p no:NAME`, and report this.",
        )


def _is_transposed(layer: QuantisedLayer) -> bool:
    return issubclass(layer.source_cls, Conv1D)


def _rows(layer: QuantisedLayer, file: Any, name: str, start: int, stop: int) -> torch.Tensor:
    stored = file.get_slice(name)
    rows: torch.Tensor = stored[:, start:stop].T if _is_transposed(layer) else stored[start:stop]
    return rows.to(layer.weight.device)


def _agrees(layer: QuantisedLayer, file: Any, name: str, dtype: torch.dtype) -> bool:
    weight = layer.weight
    if isinstance(weight, Int8Params):
        # bitsandbytes quantises to 8 bits from float16, whatever the model's dtype.
        row = _rows(layer, file, name, 0, 1).to(dtype).to(torch.float16)
        codes, scale, _ = bnb.int8_vectorwise_quant(row)
        # The first forward moves them from the weight to the layer's state.
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return torch.equal(codes, weight.data[:1]) and torch.equal(scale, scales[:1])
    found = partitions.held(weight)
    if found is None:
        return True  # on a disk
    held, first = found[0].view(torch.uint8), found[1] * weight.element_size()
    state, width = weight.quant_state, layer.in_features
    # The first whole block that this process holds, two values to the byte.
    block = -(-2 * first // state.blocksize)
    start = block * state.blocksize
    stop = min(start + state.blocksize, width * layer.out_features)
    held = held[start // 2 - first : (stop + 1) // 2 - first]
    if start >= stop or 2 * len(held) < stop - start:
        return True
    # Blocks go through the matrix laid out flat, and need not begin with a row.
    rows = _rows(layer, file, name, start // width, -(-stop // width)).flatten()
    offset = start - start // width * width
    packed, expected = bnb.quantize_4bit(
        rows[offset : offset + stop - start].to(state.dtype),
        blocksize=state.blocksize,
        quant_type=state.quant_type,
    )
    # Statistics that are quantised themselves cannot be looked at one by one.
    return torch.equal(packed.flatten(), held) and (
        state.nested or torch.equal(expected.absmax, state.absmax[block : block + 1])
    )
