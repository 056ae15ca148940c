"""The plugin ``parallel_experts``: LoRA on experts that lie in one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import llmload

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from torch import nn

CLASSES: Final = ("JetMoeParallelExperts", "GraniteMoeParallelExperts")
"""transformers' modules with a weight of shape (experts, out, in), called with rows sorted by
expert and the number of rows of each. They differ in nothing but their names."""

STARTS: Final = (True, False, "gaussian")
"""The ``init_lora_weights`` that are made here."""

VARIANTS: Final = ("use_dora", "lora_bias", "use_qalora", "kasa_config")
"""Fields of PEFT that ask for another layer than one of two factors."""


class ParallelExpertsPlugin:
    """Answers ``lora_layer`` for modules that hold all experts in one tensor.

    It has no section: the modules that ``lora`` targets say all.
    """

    name = "parallel_experts"
    requires = ("peft>=0.13.2",)

    @llmload.hookimpl(optionalhook=True)
    def lora_layer(
        self, target: nn.Module, adapter_name: str, config: LoraConfig
    ) -> LoraLayer | None:
        """Return the layer for stacked experts, and leave every other module to others.

        :raises RequestError: the experts are to get what only PEFT's own layers have.
        """
        if type(target).__name__ not in CLASSES:
            return None
        problems = list(_unknown(config))
        if problems:
            raise llmload.RequestError(problems)
        from llmload_parallel_experts.layers import ParallelExpertsLora

        return ParallelExpertsLora(target, adapter_name, config)


def _unknown(config: Any) -> Iterator[llmload.Problem]:
    fix = "Remove it, or take the experts out of `target_modules`."
    if config.init_lora_weights not in STARTS:
        yield llmload.Problem(
            where="lora.init_lora_weights",
            message=f"adapters of stacked experts do not start with {config.init_lora_weights!r}",
            fix="Write true, false or gaussian, or take the experts out of `target_modules`.",
        )
    for field in VARIANTS:
        if getattr(config, field, None):
            message = "adapters of stacked experts are two factors each, and know nothing of it"
            yield llmload.Problem(where=f"lora.{field}", message=message, fix=fix)
