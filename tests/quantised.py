"""Loads in 8 or 4 bits, by llmload and by plain transformers, held together bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from sameness import differences
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import llmload
from llmload.testing import losses

NAMES = {
    "quant_type": "bnb_4bit_quant_type",
    "double_quant": "bnb_4bit_use_double_quant",
    "compute_dtype": "bnb_4bit_compute_dtype",
    "quant_storage": "bnb_4bit_quant_storage",
    "threshold": "llm_int8_threshold",
    "skip_modules": "llm_int8_skip_modules",
}


def plain(
    folder: Path,
    section: Mapping[str, Any],
    *,
    dtype: str = "bfloat16",
    auto_class: Any = AutoModelForCausalLM,
) -> Any:
    """Load as transformers' documentation shows; what the section leaves out as by default here."""
    bits = section.get("bits", 4)
    given = {NAMES[key]: value for key, value in section.items() if key in NAMES}
    if bits == 4:
        given = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype} | given
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **given)
    name = "dtype" if int(transformers.__version__.partition(".")[0]) >= 5 else "torch_dtype"
    return auto_class.from_pretrained(
        folder, quantization_config=config, **{name: getattr(torch, dtype)}
    )


def load(
    folder: Path, section: Mapping[str, Any], *, dtype: str = "bfloat16", **others: Any
) -> llmload.LoadResult:
    """Load with the section ``kbit``, and other keys of a spec or arguments of ``llmload.load``."""
    arguments = {name: others.pop(name) for name in ("registry", "prove") if name in others}
    spec = {"model": str(folder), "dtype": dtype, "kbit": dict(section), **others}
    return llmload.load(spec, **arguments)


def unlike(ours: Any, theirs: Any) -> list[str]:
    """List every way in which two quantised models differ, quantisation states among them."""
    found = differences(ours, theirs)
    mine, other = ours.state_dict(), theirs.state_dict()
    found += [f"{n} in the state dict" for n in mine if not _same(mine[n], other.get(n))]
    layers = zip(ours.named_modules(), theirs.named_modules(), strict=True)
    for (name, one), (_, two) in layers:
        if isinstance(one, Linear4bit | Linear8bitLt) and isinstance(two, type(one)):
            a, b = _settings(one), _settings(two)
            found += [f"{name}: {key} {a[key]} for {b[key]}" for key in a if a[key] != b[key]]
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method"):
        if getattr(ours, flag, None) != getattr(theirs, flag, None):
            found.append(flag)
    one, two = ours.hf_quantizer, theirs.hf_quantizer
    if type(one) is not type(two) or one.pre_quantized != two.pre_quantized:
        found.append("hf_quantizer")
    if set(one.modules_to_not_convert) != set(two.modules_to_not_convert):
        found.append("modules_to_not_convert")
    return found


def _same(mine: torch.Tensor, other: torch.Tensor | None) -> bool:
    return (
        other is not None
        and (mine.dtype, mine.shape) == (other.dtype, other.shape)
        and torch.equal(_bytes(mine), _bytes(other))
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _settings(layer: Any) -> dict[str, Any]:
    weight = layer.weight
    common = {
        name: getattr(layer, name) for name in ("in_features", "out_features", "source_cls")
    } | {"initialised": layer._is_hf_initialized, "weight": type(weight)}
    if isinstance(layer, Linear8bitLt):
        return common | {
            "threshold": layer.state.threshold,
            "has_fp16_weights": (layer.state.has_fp16_weights, weight.has_fp16_weights),
            "use_pool": layer.state.use_pool,
            "codes are the weight": weight.CB.data_ptr() == weight.data_ptr(),
        }
    state = weight.quant_state
    return common | {
        "compute_dtype": (layer.compute_dtype, layer.compute_type_is_set),
        "storage": (layer.quant_storage, weight.quant_storage),
        "block size": (weight.blocksize, state.blocksize),
        "code": (weight.quant_type, state.quant_type, weight.compress_statistics),
        "state": (state.shape, state.dtype, state.nested),
        "state is the layer's": layer.quant_state is state and weight.module is layer,
        "done": weight.bnb_quantized,
    }


def five_losses(model: Any) -> list[float]:
    """Train five steps with a fixed seed, and return the losses."""
    return losses(model, 5)
