"""ColossalChat's own LoRA layers (coati), for adapters that are to look and train as they do there.

A dispatcher as any plugin may bring: the section ``lora`` says which adapter is made, and the hook
``lora_layer`` answers with a layer that holds its factors as ColossalChat holds them. Read from
ColossalAI 4f9953be3, ``coati/models/lora.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from llmload import Conflict, Note, Problem, RequestError
from llmload.builtin.coati.section import STARTS, CoatiSection
from llmload.hookspecs import hookimpl

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from torch import nn

    from llmload import LoadContext
    from llmload.builtin.lora.request import Request

"""Values of ``init_lora_weights`` that ColossalChat has; the second is its ``PiSSA``."""

# Fields of the section `lora` that say where an adapter goes and what it is called.
_ELSEWHERE: Final = frozenset(
    {
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules"),
        *("inference_mode", "layers_pattern", "layers_to_transform", "modules_to_save"),
        *("rank_pattern", "revision", "target_modules", "task_type"),
    }
)
_OF_THE_LAYER: Final = frozenset({"bias", "init_lora_weights", "lora_alpha", "lora_dropout", "r"})


class CoatiPlugin:
    """Answers ``lora_layer`` for linear and embedding layers."""

    name = "coati"
    Section = CoatiSection
    after = ("tokenizer", "embeddings")
    before = ("lora",)
    requires = ("peft>=0.13.2",)
    conflicts = (
        Conflict(
            key="kbit",
            reason="ColossalChat's layers adapt weights that are not quantised",
            fix="Remove `coati` or `kbit`.",
        ),
    )

    @hookimpl
    def check(self, ctx: LoadContext) -> Iterator[Problem | Note]:
        """Say what the layers will be like, and refuse what they do not have."""
        if "lora" not in ctx.active:
            yield Problem(
                where="coati",
                message="the spec has no section `lora`, which says what adapter to make",
                fix="Add it, or remove `coati`.",
            )
            return
        from llmload.builtin.lora.request import resolve

        try:
            request = resolve(ctx)
        except RequestError:  # the plugin `lora` says it
            return
        yield from _beyond(request)
        yield Note(text="ColossalChat's layers: float32 factors lora_A and lora_B in every layer")
        if ctx.section(CoatiSection).faults:
            unbiased = request.fields.get("bias", "none") == "none"
            dropped = ", and pretrained biases are dropped" if unbiased else ""
            yield Note(
                text=f"with ColossalChat's faults: linear layers have alpha 32 and dropout 0.0"
                f"{dropped}"
            )

    @hookimpl
    def lora_layer(
        self, ctx: LoadContext, target: nn.Module, adapter_name: str, config: LoraConfig
    ) -> LoraLayer | None:
        """Make the layer; one whose forward is its own (a scaled embedding) is left to PEFT."""
        from llmload.builtin.coati.layers import layer_for

        faults = ctx.section(CoatiSection).faults
        return layer_for(target, adapter_name, config, faults=faults)


def _beyond(request: Request) -> Iterator[Problem]:
    """Yield the fields of the section ``lora`` that ask for what these layers do not have."""
    from llmload.builtin.lora.section import LoraSection

    # A saved adapter's file has every field of PEFT's, most of them at their defaults.
    defaults = LoraSection().model_dump(mode="json")
    for name, value in request.fields.items():
        if name not in _ELSEWHERE | _OF_THE_LAYER and value != defaults[name]:
            yield Problem(
                where=f"lora.{name}",
                message="ColossalChat's layers have nothing of the kind",
                fix=f"Remove `{name}`, or the section `coati`.",
            )
    if request.initialisation not in STARTS:
        yield Problem(
            where="lora.init_lora_weights",
            message=f"ColossalChat's layers start by kaiming_uniform or PiSSA, and"
            f" {request.initialisation!r} was asked for",
            fix="Write true or pissa_niter_4, or remove the section `coati`.",
        )
