"""Quantisers, bitsandbytes above all, as transformers 5 calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def quantises_weight_by_weight() -> bool:
    """It does, and on a CPU too."""
    return True


def prepare_quantised(
    quantiser: Any, model: PreTrainedModel, dtype: torch.dtype, device_map: Any
) -> None:
    """Do it in the order of ``from_pretrained``."""
    dtype = quantiser.update_dtype(dtype)
    quantiser.preprocess_model(model=model, dtype=dtype, device_map=device_map, checkpoint_files=[])


def modules_left_unquantised(model: PreTrainedModel) -> list[str]:
    """As transformers finds them."""
    from transformers.quantizers.base import get_keys_to_not_convert

    found: list[str] = get_keys_to_not_convert(model)
    return found


def leaves_unquantised(pattern: str, module: str) -> bool:
    """As transformers matches it."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(module, [pattern])
