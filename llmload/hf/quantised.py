"""What transformers would say of a folder whose config declares a quantisation, before it reads."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmload.errors import Problem, in_one_line
from llmload.hf.versions import installed_transformers
from llmload.spec.values import dtype_name

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from llmload.checkpoint import TensorInfo
    from llmload.spec.loadspec import LoadSpec

_WHERE = "model"
_PLAIN = "Load the checkpoint from before it was quantised"


@dataclass(frozen=True)
class Stored:
    """A quantisation as a folder's config declares it."""

    method: str
    """Its name in transformers."""
    dequantised: bool = False
    """Whether transformers makes plain numbers of it while it loads."""
    trainable: bool = True
    """Whether transformers says that a model quantised so can be trained."""


def declared(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return the quantisation that a config declares, also for its text part; or None."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(), "quantization_config", None)
    if found is None:
        return None
    return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


def by_bitsandbytes(content: Mapping[str, Any]) -> bool:
    """Say whether a declared quantisation is 8 or 4 bits by bitsandbytes."""
    return bool(content.get("load_in_4bit") or content.get("load_in_8bit"))


def examine(
    blank: PreTrainedModel, config: PretrainedConfig, spec: LoadSpec, dtype: torch.dtype
) -> Stored | Problem:
    """Have transformers' quantiser do all that it does before weights are read, on a copy.

    For a config that :func:`declared` finds something in. Some import the package that they need
    only when they prepare the model's modules.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

    content = declared(config) or {}
    method = _method(content)
    known = sorted(AUTO_QUANTIZER_MAPPING)
    if method not in known and not by_bitsandbytes(content):
        # transformers would log a line and take the codes for weights.
        by = f"by {method!r}, which transformers does not know" if method else "and not by what"
        return Problem(
            where=_WHERE,
            message=f"the config says that the checkpoint is quantised {by}; transformers knows"
            f" {', '.join(known)}",
            fix="Remove `quantization_config` from config.json if the weights are plain numbers, or"
            " install what knows the method.",
        )
    try:
        quantiser = AutoHfQuantizer.from_config(copy.deepcopy(content), pre_quantized=True)
        quantiser.validate_environment(
            device_map=spec.device_map,
            weights_only=True,
            **installed_transformers().dtype_option(dtype),
        )
        devices = quantiser.update_device_map(spec.device_map)
        _try_devices(devices, spec.device_map)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the load itself gives them again
            installed_transformers().prepare_quantised(
                quantiser, copy.deepcopy(blank), dtype, devices
            )
        settings = quantiser.quantization_config
        dequantised = bool(getattr(settings, "dequantize", False))
        return Stored(method, dequantised, dequantised or bool(_is_trainable(quantiser)))
    except Exception as error:  # each method raises kinds of its own
        return Problem(
            where=_WHERE,
            message=f"the checkpoint is quantised by {method}, and transformers cannot load that"
            f" here: {in_one_line(error).rstrip('.')}",
            fix=f"Install what it asks for, or load where it runs. {_PLAIN} otherwise.",
        )


def _try_devices(chosen: Any, asked: object) -> None:
    """Use each device that a quantiser chose by itself.

    :raises ValueError: there is none.
    """
    import torch

    if chosen != asked and isinstance(chosen, Mapping):
        for device in chosen.values():
            try:
                torch.empty(1, device=device)
            except Exception as error:  # torch raises several kinds, at length
                raise ValueError(f"it takes the device {device!r}, which is not here") from error


def problems(
    blank: PreTrainedModel,
    config: PretrainedConfig,
    spec: LoadSpec,
    dtype: torch.dtype,
    tensors: Mapping[str, TensorInfo],
) -> Iterator[Problem]:
    """Yield why a quantised folder cannot be loaded, or not be trained as the spec wants.

    :param blank: the model that the config describes, without storage.
    :param tensors: of the checkpoint.
    """
    found = examine(blank, config, spec, dtype)
    name = dtype_name(dtype)
    if isinstance(found, Problem):
        yield found
        return
    if found.method == "fp8":
        yield from without_scales(tensors, divided=found.dequantised)
    if found.dequantised:
        yield Problem(
            where=_WHERE,
            severity="warning",
            message=f"the checkpoint is quantised by {found.method}, of which transformers makes"
            f" {name} here while it loads; what it computes so is not held against the file",
            fix=f"{_PLAIN} for a model of which every value is proved.",
        )
    elif spec.trainable and not found.trainable:
        yield Problem(
            where="trainable",
            message=f"the checkpoint is quantised by {found.method}, and transformers cannot train"
            " a model that is quantised so, nor through it",
            fix=f"{_PLAIN}, or set `trainable: false` to use the model as it is.",
        )


def without_scales(tensors: Mapping[str, TensorInfo], *, divided: bool) -> Iterator[Problem]:
    """Refuse floats of 8 bits that have no scale, or one that does not divide them.

    transformers would take the first for plain numbers, without a word.

    :param tensors: of the checkpoint of a folder quantised by fp8, by their names there.
    :param divided: whether each scale must divide its tensor, as where transformers dequantises.
    """
    for name, info in tensors.items():
        if info.dtype not in ("F8_E4M3", "F8_E5M2") or "scale" in name.rpartition(".")[2]:
            continue
        scales = [tensors[key] for key in _names_of_scales(name) if key in tensors]
        if not scales:
            yield Problem(
                where=name,
                message="the checkpoint is quantised, and has 8-bit floats here without a scale",
                fix="Fetch or convert the checkpoint again: a tensor is missing in it.",
            )
        grid = scales[0].shape if scales else ()
        pairs = zip(info.shape[-2:], grid[-2:], strict=False) if len(grid) > 1 else ()
        if divided and any(size % parts for size, parts in pairs if parts):
            yield Problem(
                where=name,
                message=f"the checkpoint has 8-bit floats {info.shape} with scales {grid}, which do"
                " not divide them",
                fix="Check that config.json and weights belong together.",
            )


def _names_of_scales(name: str) -> list[str]:
    """Return what the scale of a tensor is called, as the writers of fp8 folders have it."""
    module, dot, leaf = name.rpartition(".")
    leaves = [f"{leaf}_scale_inv", f"{leaf}_scale"]
    if leaf == "weight":
        leaves += ["scale", "qscale_weight"]
    return [f"{module}{dot}{other}" for other in leaves]


def _method(content: Mapping[str, Any]) -> str:
    method = content.get("quant_method")
    return str(getattr(method, "value", method) or "")


def _is_trainable(quantiser: Any) -> bool:
    """Return transformers' answer, which is a property or a method."""
    found = quantiser.is_trainable
    return bool(found() if callable(found) else found)
