"""Quantisers, bitsandbytes above all, as transformers 4.51.3 calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def quantises_weight_by_weight() -> bool:
    """Its quantiser fills layers in ways of its own, on accelerators only."""
    return False


def prepare_quantised(
    quantiser: Any, model: PreTrainedModel, dtype: torch.dtype, device_map: Any
) -> None:
    """Do it in the order of ``from_pretrained``."""
    quantiser.update_torch_dtype(dtype)
    quantiser.preprocess_model(
        model=model, device_map=device_map, keep_in_fp32_modules=[], config=model.config
    )


def modules_left_unquantised(model: PreTrainedModel) -> list[str]:
    """As transformers finds them."""
    from transformers.integrations import get_keys_to_not_convert

    found: list[str] = get_keys_to_not_convert(model)
    return found


def leaves_unquantised(pattern: str, module: str) -> bool:
    """Only whole names match, and parts between dots."""
    return f"{pattern}." in module or pattern in (module, module.rpartition(".")[2])
