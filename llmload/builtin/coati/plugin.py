"""ColossalChat's own LoRA layers (coati), for adapters that are to look and train as they do there.

A dispatcher as any plugin may bring: the section ``lora`` says which adapter is made, and the hook
``lora_layer`` answers with a layer that holds its factors as ColossalChat holds them. Read from
ColossalAI 4f9953be3, ``coati/models/lora.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from llmload.builtin.coati import keys
from llmload.builtin.coati.section import STARTS, CoatiSection
from llmload.hookspecs import hookimpl
from llmload.plugin import Conflict, Note, Problem

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from torch import nn

    from llmload.plugin import KeyRule, LoadContext

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
    stage = "model"
    after = ("embeddings",)
    Section = CoatiSection
    requires = ("peft>=0.13.2",)
    key_rules: ClassVar[Mapping[str, KeyRule]] = {"coati": keys.undo}
    conflicts = (
        Conflict(
            ability="quantisation",
            reason="ColossalChat's layers adapt weights that are not quantised",
            fix="Remove `coati`, or load the weights unquantised.",
        ),
    )

    @hookimpl
    def check(self, ctx: LoadContext) -> Iterator[Problem | Note]:
        """Say what the layers will be like."""
        if not ctx.hooks.declared("lora_layer"):
            yield Problem(
                where="coati",
                message="the spec has no section `lora`, which says what adapter to make",
                fix="Add it, or remove `coati`.",
            )
            return
        yield Note(text="ColossalChat's layers: float32 factors lora_A and lora_B in every layer")

    @hookimpl
    def check_lora(
        self, ctx: LoadContext, section: Any, fields: Mapping[str, Any]
    ) -> Iterator[Problem | Note]:
        """Refuse what the layers do not have."""
        # A saved adapter's file has every field of PEFT's, most of them at their defaults.
        yield from _beyond(fields, type(section)().model_dump(mode="json"))
        if ctx.section(CoatiSection).faults:
            unbiased = fields.get("bias", "none") == "none"
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


def _beyond(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the fields of an adapter that ask for what these layers do not have."""
    for name, value in fields.items():
        if name not in _ELSEWHERE | _OF_THE_LAYER and value != defaults[name]:
            yield Problem(
                where=f"lora.{name}",
                message="ColossalChat's layers have nothing of the kind",
                fix=f"Remove `{name}`, or the section `coati`.",
            )
    start = fields.get("init_lora_weights", True)
    if start not in STARTS:
        yield Problem(
            where="lora.init_lora_weights",
            message=f"ColossalChat's layers start by kaiming_uniform or PiSSA, and {start!r} was"
            " asked for",
            fix="Write true or pissa_niter_4, or remove the section `coati`.",
        )
