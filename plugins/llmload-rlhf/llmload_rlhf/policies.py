"""The plugin ``coati_policy``: old coati's language models with LoRA factors beside the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from llmload import Conflict, Note, Problem, RequestError, Section, hookimpl
from llmload.plugin import installed_transformers
from llmload_rlhf import factors

if TYPE_CHECKING:
    from torch import nn

    from llmload import LoadContext

_WRAPPER = "model."
"""Goes before every key of an ``Actor``'s own state, which coati 0.2.8 saves."""
_OUTPUT = "lm_head"


class CoatiPolicySection(Section):
    """A policy of old coati, its LoRA factors merged."""

    version: Literal["0.2.8", "0.3.4"]
    """Which coati saved it; both scale factors by 1 / r."""


class CoatiPolicyPlugin:
    """Adds to each weight what its ``lora_A`` and ``lora_B`` make, the head's among them."""

    name = "coati_policy"
    stage = "model"
    before = ("embeddings",)  # whose new rows have no factors
    Section = CoatiPolicySection
    conflicts: ClassVar = tuple(
        Conflict(
            key=key,
            reason="reward models and critics have their factors merged by the head's section",
            fix="Remove `coati_policy`.",
        )
        for key in ("critic_head", "reward_head")
    )

    @hookimpl
    def map_keys(self, ctx: LoadContext, keys: tuple[str, ...]) -> Mapping[str, str | None]:
        """Take the factors, and give the weights the names that they have in the model itself."""
        claimed: dict[str, str | None] = dict.fromkeys(factors.factors_in(keys))
        if not claimed:
            raise RequestError(
                Problem(
                    where=self.name,
                    message="the checkpoint keeps no LoRA factors beside its weights",
                    fix=f"Remove `{self.name}`.",
                )
            )
        rest = [key for key in keys if key not in claimed]
        names = ctx.blank.state_dict().keys()
        if all(key.startswith(_WRAPPER) for key in rest) and names.isdisjoint(rest):
            return claimed | {key: key.removeprefix(_WRAPPER) for key in rest}
        return claimed

    @hookimpl
    def check(self, ctx: LoadContext) -> Iterator[Problem | Note]:
        """Hold the factors to the weights, and give a head that has some a weight of its own."""
        yield from factors.problems(ctx, "", _prefix(ctx))
        yield Note(text=factors.said(ctx))
        output = f"{_OUTPUT}.weight"
        tied = installed_transformers().ties(ctx.blank).get(output)
        if tied is not None and f"{_prefix(ctx)}{_OUTPUT}.lora_A" in ctx.claimed:
            ctx.untie()
            yield Note(text=f"{output!r} has factors that {tied!r} lacks: they are untied")

    @hookimpl
    def post_load(self, ctx: LoadContext, model: nn.Module) -> nn.Module:
        """Merge them."""
        if not ctx.rehearsing:
            factors.merge(ctx, model, "", _prefix(ctx))
        return model


def _prefix(ctx: LoadContext) -> str:
    """Return what goes before the model's own names in the factors' keys."""
    names = ctx.blank.state_dict().keys()
    stems = [key.rpartition(".")[0] for key in ctx.claimed]
    known = any(f"{stem}.weight" in names for stem in stems)
    return "" if known or not all(stem.startswith(_WRAPPER) for stem in stems) else _WRAPPER
