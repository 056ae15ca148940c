"""What transformers quantises, and how, by version."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmload.plugin import release_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantises_weight_by_weight() -> bool:
    """Say whether transformers has bitsandbytes make one weight after the other, on a CPU too.

    Both came with 5.0; before, its quantiser fills layers in ways of its own, on accelerators only.
    """
    return release_of("transformers") >= (5,)


def modules_left_unquantised(model: PreTrainedModel) -> list[str]:
    """Return the modules that transformers does not quantise if it is not told which: the output
    head, what is tied, the last one. The function moved with 5.0."""
    if release_of("transformers") >= (5,):
        from transformers.quantizers.base import get_keys_to_not_convert
    else:
        from transformers.integrations import get_keys_to_not_convert
    return get_keys_to_not_convert(model)  # type: ignore[no-any-return]


def leaves_unquantised(pattern: str, module: str) -> bool:
    """Say whether ``pattern`` among ``llm_int8_skip_modules`` keeps the linear layer ``module`` out
    of quantisation. 4.51.3 knows whole names and parts between dots only."""
    if release_of("transformers") >= (5,):
        from transformers.quantizers.quantizers_utils import should_convert_module

        return not should_convert_module(module, [pattern])
    return f"{pattern}." in module or pattern in (module, module.rpartition(".")[2])
