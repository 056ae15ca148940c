"""bitsandbytes as transformers 4.51.3 calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantises_weight_by_weight() -> bool:
    """Its quantiser fills layers in ways of its own, on accelerators only."""
    return False


def modules_left_unquantised(model: PreTrainedModel) -> list[str]:
    """As transformers finds them."""
    from transformers.integrations import get_keys_to_not_convert

    found: list[str] = get_keys_to_not_convert(model)
    return found


def leaves_unquantised(pattern: str, module: str) -> bool:
    """Only whole names match, and parts between dots."""
    return f"{pattern}." in module or pattern in (module, module.rpartition(".")[2])
