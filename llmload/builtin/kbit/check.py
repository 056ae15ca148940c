"""What is asked, against what the folder holds and what is installed; before a model is built."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from llmload.builtin.kbit.section import KbitSection
from llmload.plugin import (
    Note,
    Problem,
    RequestError,
    dtype_name,
    in_one_line,
    installed_transformers,
    some,
    version_of,
)

if TYPE_CHECKING:
    from llmload.plugin import LoadContext

_IN_CONFIG: Final = {
    "quant_type": "bnb_4bit_quant_type",
    "double_quant": "bnb_4bit_use_double_quant",
    "compute_dtype": "bnb_4bit_compute_dtype",
    "quant_storage": "bnb_4bit_quant_storage",
    "threshold": "llm_int8_threshold",
    "fp32_cpu_offload": "llm_int8_enable_fp32_cpu_offload",
}
"""Key of the section -> what a BitsAndBytesConfig calls it."""

_FLOATS: Final = ("float16", "bfloat16", "float32")

_WORTH_TELLING: Final = 0.05
"""Share of the parameters below which it is not worth a warning that they stay as they are."""
_SHOWN: Final = 4

SPREADING: Final = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of ``device_map`` by which a model is spread over devices."""


def stored_quantisation(ctx: LoadContext) -> dict[str, Any] | None:
    """Return the quantisation that the folder's config declares, or None: not quantised yet."""
    found = getattr(ctx.config, "quantization_config", None)
    if found is None:
        return None
    return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


def compute_dtype(ctx: LoadContext, section: KbitSection) -> str:
    """Return the dtype in which 4-bit layers multiply: as asked, else the model's."""
    return section.compute_dtype or dtype_name(ctx.dtype)


def storage(ctx: LoadContext, section: KbitSection) -> str:
    """Return the dtype of packed codes: as asked, else uint8, else what can be sharded."""
    if section.quant_storage is not None:
        return section.quant_storage
    sharded = fsdp_announced() or _zero3_announced() or partitioned(ctx)
    return dtype_name(ctx.dtype) if sharded else "uint8"


def partitioned(ctx: LoadContext) -> bool:
    """Say whether each process keeps a part of every weight, as another plugin's `check` said."""
    return ctx.splits


def fsdp_announced() -> bool:
    """Say whether ``accelerate launch`` told this process that FSDP will shard the model."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _deepspeed_announced() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def _zero3_announced() -> bool:
    return _deepspeed_announced() and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"


def check(ctx: LoadContext, section: KbitSection) -> Iterator[Problem | Note]:
    """Yield what stands in the way, and what will be done."""
    yield from backend()
    yield from _devices(ctx, section)
    yield from _placement(ctx)
    yield from _deepspeed(ctx, section)
    stored = stored_quantisation(ctx)
    if stored is not None:
        yield from _contradictions(ctx, section, stored)
        yield Note(text="the checkpoint is quantised already")
    else:
        yield Note(text=_described(ctx, section))
        if partitioned(ctx):
            yield Note(
                text="each rank reads what it quantises whole, one weight at a time, and keeps its"
                " part of the codes and all statistics"
            )
    if section.cache is not None:
        yield from _cache(ctx, section)
    yield from _beyond_linear_layers(ctx)
    yield Note(text=f"freeze the base model, prepared as {section.prepare}")
    if section.prepare in ("legacy", "trl_legacy") and not ctx.providing("gradient_checkpointing"):
        yield Note(
            text="no gradient checkpointing, which belongs to the preparation in PEFT and has its"
            " own section here"
        )


def _cache(ctx: LoadContext, section: KbitSection) -> Iterator[Problem | Note]:
    """Say what will be kept and found, or why nothing can be."""
    from llmload.builtin.kbit import cache

    if stored_quantisation(ctx) is not None:
        yield Problem(
            where="kbit.cache",
            message="the checkpoint is quantised already, so there is nothing to keep",
            fix="Remove `cache`.",
        )
        return
    one_by_one = installed_transformers().quantises_weight_by_weight()
    if not one_by_one or ctx.spec.device_map in SPREADING:
        yield Problem(
            where="kbit.cache",
            message="from_pretrained quantises this model, and keeps nothing",
            fix="Remove `cache`"
            + (", or leave `device_map` out." if one_by_one else ", or use transformers 5."),
        )
        return
    files = ctx.checkpoint.files if ctx.checkpoint is not None else ()
    unversioned = [file.name for file in files if file.fetch is not None and not file.version]
    if unversioned:
        yield Problem(
            where="kbit.cache",
            message=f"nothing tells whether {some(unversioned)}, which come from elsewhere, are"
            " the same again",
            fix="Remove `cache`, or load from a folder.",
        )
        return
    try:
        text = cache.described(section)
    except RequestError as error:
        for problem in error.problems:
            yield problem.model_copy(update={"where": "kbit.cache.folder"})
        return
    yield Note(text=text)
    if partitioned(ctx):
        yield Problem(
            where="kbit.cache",
            severity="warning",
            message="each process keeps a part of the weights, so that what is kept is taken, and"
            " nothing is added",
            fix="Fill the cache beforehand by one process, with the same `kbit` and without the"
            " section that splits.",
        )


def _beyond_linear_layers(ctx: LoadContext) -> Iterator[Problem]:
    """Warn of matrices that are not in linear layers, such as experts merged into one parameter.

    bitsandbytes has layers for linear ones only; what stays decides on the memory of such a model.
    """
    from torch import nn
    from torch.nn.modules.conv import _ConvNd
    from transformers.pytorch_utils import Conv1D

    usual = (nn.Linear, Conv1D, nn.Embedding, _ConvNd)
    tied = installed_transformers().tied_names(ctx.blank)
    left: dict[str, int] = {}
    total = 0
    for path, module in ctx.blank.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if f"{path}.{attribute}" in tied:
                continue
            total += parameter.numel()
            if parameter.ndim >= 2 and not isinstance(module, usual):
                left[f"{path}.{attribute}"] = parameter.numel()
    number = sum(left.values())
    if number < _WORTH_TELLING * total:
        return
    kinds = sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in left})
    yield Problem(
        where="kbit",
        severity="warning",
        message=f"{number:,} of {total:,} parameters stay in {dtype_name(ctx.dtype)},"
        f" {number * ctx.dtype.itemsize:,} bytes: bitsandbytes quantises linear layers, and"
        f" {', '.join(kinds[:_SHOWN])}{', ...' if len(kinds) > _SHOWN else ''} are none",
        fix="Count on that memory, or use a checkpoint that is quantised otherwise.",
    )


def _described(ctx: LoadContext, section: KbitSection) -> str:
    if section.bits == 8:
        return f"quantise to 8 bits, outliers above {section.threshold:g} in 16"
    double = ", statistics quantised too" if section.double_quant else ""
    return (
        f"quantise to 4 bits: {section.quant_type} in blocks of {section.block_size}{double},"
        f" stored as {storage(ctx, section)}, computing in {compute_dtype(ctx, section)}"
    )


def backend() -> Iterator[Problem]:
    """Yield why transformers takes no bitsandbytes here."""
    from transformers.integrations import validate_bnb_backend_availability

    try:
        validate_bnb_backend_availability(raise_exception=True)
    except RuntimeError as error:
        version = version_of("transformers")
        reason = in_one_line(error).partition(". ")[0].rstrip(".")
        fix = "Run on a device that bitsandbytes supports."
        if not installed_transformers().quantises_weight_by_weight():
            # Its own sentence lists sets, in an order that changes from run to run.
            reason = "it finds no accelerator, and does not take the CPU"
            fix = "Run on an accelerator, or use transformers 5, which takes bitsandbytes on a CPU."
        yield Problem(
            where="kbit",
            message=f"transformers {version} refuses bitsandbytes here: {reason}",
            fix=fix,
        )


def _devices(ctx: LoadContext, section: KbitSection) -> Iterator[Problem]:
    asked = ctx.spec.device_map
    places = {str(place) for place in asked.values()} if isinstance(asked, Mapping) else set()
    on_host = places & {"cpu"}
    if section.fp32_cpu_offload and not (on_host and places - on_host):
        yield Problem(
            where="kbit.fp32_cpu_offload",
            message="no modules are put on the CPU beside others on an accelerator",
            fix="Remove it, or name the modules in `device_map`.",
        )
    elif on_host and places != {"cpu"} and not section.fp32_cpu_offload:
        yield Problem(
            where="device_map",
            message=f"some modules are put on {' and '.join(sorted(on_host))}, where bitsandbytes"
            " does not compute for a model on an accelerator",
            fix="Put them on the accelerator, or set `kbit: {fp32_cpu_offload: true}` to keep them"
            " unquantised.",
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if asked in SPREADING and processes > 1:
        yield Problem(
            where="device_map",
            message=f"each of {processes} processes would spread its model over all devices",
            fix="Leave `device_map` out: each process then takes the device of its local rank.",
        )


def _placement(ctx: LoadContext) -> Iterator[Problem]:
    """Refuse a plugin that stores weights in a way that quantised ones cannot be stored in."""
    other = ctx.placed_by
    if other is not None and not ctx.splits and stored_quantisation(ctx) is None:
        yield unsuited(f"`{other}`")


def unsuited(what: str) -> Problem:
    """Return the problem that a placement before ours takes no quantised weights."""
    return Problem(
        where="kbit",
        message=f"{what} stores the weights in its own way, and takes none that are quantised: it"
        " has no `part`, as llmload.checkpoint.placement.Splitting has",
        fix="Leave out one of the two. A plugin whose placement has it says so in its `check`:"
        " `ctx.splits = True`.",
    )


def adapter(section: KbitSection, dtype: str) -> Iterator[Problem]:
    """TRL casts the adapter, which here is the business of the section ``lora``."""
    if section.prepare == "trl" and dtype != "bfloat16":
        yield Problem(
            where="kbit.prepare",
            message=f"`trl` has adapters in bfloat16, and `lora.adapter_dtype` is {dtype!r}",
            fix="Set `lora: {adapter_dtype: bfloat16}`.",
        )


def dora(ctx: LoadContext, section: KbitSection, fields: Mapping[str, Any]) -> Iterator[Problem]:
    """Refuse DoRA on 8-bit layers where they compute on the CPU.

    It looks at each weight in its forward; of one on the CPU, PEFT's ``dequantize_module_weight``
    puts a copy in its place (``weight.to(device)``), which has lost its scales.
    """
    targets = fields.get("target_modules")
    left = [*section.skip_modules, *installed_transformers().modules_left_unquantised(ctx.blank)]
    untouched = isinstance(targets, list) and set(targets) <= set(left)
    if fields.get("use_dora") and _bits(ctx, section) == 8 and _on_cpu(ctx) and not untouched:
        yield Problem(
            where="lora.use_dora",
            message=f"DoRA on 8-bit layers works for one forward pass on the CPU: there peft"
            f" {version_of('peft')} loses the scales of each weight that DoRA looks at, and the"
            " second forward fails",
            fix="Use `kbit: {bits: 4}`, LoRA without `use_dora`, or an accelerator.",
        )


def _on_cpu(ctx: LoadContext) -> bool:
    """Say whether the quantised layers compute on the CPU, by the spec or for want of all else."""
    asked = ctx.spec.device_map
    if isinstance(asked, Mapping):
        return "cpu" in asked.values()
    return asked == "cpu" or _accelerators() == 0


def _accelerators() -> int:
    import torch

    return torch.cuda.device_count() + torch.xpu.device_count()


def _bits(ctx: LoadContext, section: KbitSection) -> int:
    """Return the bits of the quantised weights: as stored, else as asked."""
    stored = stored_quantisation(ctx)
    if stored is None:
        return section.bits
    return 8 if stored.get("load_in_8bit") else 4


def _deepspeed(ctx: LoadContext, section: KbitSection) -> Iterator[Problem]:
    """DeepSpeed 0.19 takes codes stored as floating point for values: it casts them to its dtype.

    In ``deepspeed.initialize``, silently, at any ZeRO stage, with other losses from the first step.
    """
    who = ctx.cast_later_by or ("DeepSpeed" if _deepspeed_announced() else "")
    if not (who or partitioned(ctx)):
        return
    stored = stored_quantisation(ctx)
    bits, as_dtype = _bits(ctx, section), section.quant_storage
    if stored is not None:
        as_dtype = stored.get("bnb_4bit_quant_storage")
    if bits == 8 and partitioned(ctx):
        yield Problem(
            where="kbit.bits",
            message=f"`{ctx.placed_by}` cannot split 8-bit weights: bitsandbytes keeps the whole"
            " codes in the layer, beside the parameter",
            fix="Use `bits: 4`, or keep the whole model in each process, as ZeRO does below stage"
            " 3.",
        )
    elif who and bits == 4 and as_dtype in _FLOATS and as_dtype != dtype_name(ctx.dtype):
        yield Problem(
            where="kbit.quant_storage",
            message=f"{who} casts every floating-point parameter to {dtype_name(ctx.dtype)}, codes"
            f" stored as {as_dtype} too, which ruins them",
            fix=f"Remove the key, or set `quant_storage: {dtype_name(ctx.dtype)}`."
            if stored is None
            else "Load the checkpoint from before it was quantised.",
        )


def _contradictions(
    ctx: LoadContext, section: KbitSection, stored: Mapping[str, Any]
) -> Iterator[Problem]:
    """Compare what the section says, defaults aside, with how the checkpoint was quantised."""
    bits = {"load_in_4bit": 4, "load_in_8bit": 8}
    found = next((number for key, number in bits.items() if stored.get(key)), None)
    if found is None:
        method = getattr(stored.get("quant_method"), "value", stored.get("quant_method"))
        yield Problem(
            where="kbit",
            message=f"the checkpoint is quantised already, by {method}, not by bitsandbytes",
            fix="Remove `kbit`.",
        )
        return
    has = {key: stored[name] for key, name in _IN_CONFIG.items() if name in stored}
    has["bits"] = found
    if (block := _stored_block_size(ctx)) is not None:
        has["block_size"] = block
    for key in sorted(section.model_fields_set & has.keys()):
        asked = getattr(section, key)
        if asked is not None and asked != (value := has[key]):
            yield Problem(
                where=f"kbit.{key}",
                message=f"{asked!r} is asked for, and the checkpoint is quantised with {value!r}",
                fix="Remove the key, or load the checkpoint from before it was quantised.",
            )
    if section.skip_modules:
        yield Problem(
            where="kbit.skip_modules",
            message="the checkpoint is quantised already, with modules left out as it has them",
            fix="Remove the key, or load the checkpoint from before it was quantised.",
        )


def _stored_block_size(ctx: LoadContext) -> int | None:
    """Find the block size, which no config says, from the number of statistics."""
    tensors = ctx.checkpoint.tensors if ctx.checkpoint is not None else {}
    for name, statistics in tensors.items():
        weight = tensors.get(name.removesuffix(".absmax"))
        if name.endswith(".weight.absmax") and weight is not None:
            values = 2 * weight.nbytes / statistics.numel
            return 1 << math.ceil(math.log2(values))
    return None
