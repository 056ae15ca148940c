"""The dtype names of safetensors and torch's own, both ways. torch is imported on first use."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}


@cache
def _table() -> dict[str, torch.dtype]:
    import torch

    return {
        name: getattr(torch, spelled)
        for name, spelled in _TORCH_NAMES.items()
        if hasattr(torch, spelled)  # float8_e8m0fnu came with torch 2.7
    }


def torch_dtype(name: str) -> torch.dtype | None:
    """The torch dtype that safetensors calls ``name``; None where this torch has none (``F4``)."""
    return _table().get(name)


def safetensors_dtype(dtype: torch.dtype) -> str:
    """Return what safetensors calls ``dtype``.

    :raises ValueError: the format has no such.
    """
    for name, known in _table().items():
        if known == dtype:
            return name
    raise ValueError(f"safetensors has no name for {dtype}")
