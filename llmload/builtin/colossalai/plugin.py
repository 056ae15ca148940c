"""The plugin ``colossalai``: lazy initialisation that ends in the right weights.

ColossalAI's own ``from_pretrained`` under ``LazyInitContext`` fails on transformers 5; on 4.51.3 it
leaves uninitialised memory wherever no Booster loads the weights later. Here the streaming loader
fills each lazy tensor from the checkpoint's mapped file, or the model is handed over lazy, with the
checkpoint recorded and everything checked that ``Booster.boost`` would lose in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from llmload.builtin.colossalai.section import MATERIALISE, ColossalaiSection
from llmload.hookspecs import hookimpl
from llmload.plugin import Conflict, Decline, Note, Problem, version_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from llmload.plugin import Forecast, LoadContext

_LAZY_ONLY = (
    "Install it with `pip install --no-deps colossalai==0.5.0`: what it asks for would replace"
    " torch and transformers."
)
_WHOLE_STACK = (
    "Install the colossalai stack in an environment of its own, in a clone of llmload with `pip"
    " install -c constraints/colossalai.txt '.[colossalai]'`, or use `materialize: true`."
)

_BOOSTER = "Booster.boost"


def _stays_lazy(section: Any, other: Any) -> bool:
    return not section.materialize


def _is_random(section: Any, weights: Any) -> bool:
    return bool(weights == "random")


class ColossalaiPlugin:
    """Has models built lazily, and filled by the streaming loader or by a Booster."""

    name = "colossalai"
    stage = "load"
    audits_rehearsal = True
    Section = ColossalaiSection
    before = ("streaming",)
    conflicts = (
        Conflict(
            key="weights",
            when=_is_random,
            reason="lazy tensors are filled from a checkpoint",
            fix="Remove `colossalai`, or load a checkpoint.",
        ),
        Conflict(
            ability="quantisation",
            reason="ColossalAI shards and trains weights as they are in the checkpoint",
            fix="Remove `colossalai`, or load the weights unquantised.",
        ),
        Conflict(
            key="zero3",
            reason="both decide where each weight is stored",
            fix="Remove `colossalai` or `zero3`.",
        ),
        Conflict(
            key="device_map",
            when=_stays_lazy,
            reason="the Booster chooses the devices",
            fix="Remove `device_map`.",
        ),
        *(
            Conflict(
                key=key,
                when=_stays_lazy,
                reason="the Booster finds weights by their names in the checkpoint",
                fix=MATERIALISE,
            )
            for key in ("key_map", "key_rules", "weights_from")
        ),
        Conflict(
            ability="embeddings",
            when=_stays_lazy,
            reason="embeddings are resized with the weights that the Booster has yet to load",
            fix=MATERIALISE,
        ),
    )

    @hookimpl
    def diagnose(self) -> Iterator[Problem | Note]:
        """Try out lazy initialisation and the import of a Booster."""
        problem = _unusable(materialize=True)
        if problem:
            yield problem
            return
        yield Note(text=f"lazy initialisation with colossalai {version_of('colossalai')}")
        problem = _unusable(materialize=False)
        yield (
            problem.model_copy(update={"severity": "warning"})
            if problem
            else Note(text="models that stay lazy for Booster.boost")
        )

    @hookimpl
    def check(self, ctx: LoadContext) -> Iterator[Problem | Note | Decline]:
        """Try out what the installed colossalai can do, and say how the model will be filled."""
        section = ctx.section(ColossalaiSection)
        problem = _unusable(materialize=section.materialize)
        ctx.placed_by = self.name
        if problem:
            yield problem
            return
        from llmload.builtin.colossalai import booster

        yield from booster.plugin_problems(section)
        if section.materialize:
            yield Note(text="build under LazyInitContext; the streaming loader fills each tensor")
            yield Decline("`materialize: true` leaves the filling to the streaming loader")
            return
        ctx.awaiting = _BOOSTER
        yield from booster.check(ctx, section)
        yield Note(text="build under LazyInitContext; Booster.boost loads the weights")

    @hookimpl
    def check_lora(
        self, ctx: LoadContext, section: Any, fields: Mapping[str, Any], changes_base: str
    ) -> Iterator[Problem]:
        """Refuse an adapter that needs its base's values, which are not there yet."""
        from llmload.builtin.colossalai import booster

        if not ctx.section(ColossalaiSection).materialize:
            yield from booster.adapter_problems(section.adapter_name, fields, changes_base)

    @hookimpl
    def cost(self, ctx: LoadContext, forecast: Forecast) -> None:
        """Say that weights come later where they do."""
        if ctx.section(ColossalaiSection).materialize:
            return
        for weight in forecast.weights.values():
            if weight.since == "load":
                weight.since, weight.on_pages = "use", False
                weight.route, weight.why = "lazy", "Booster.boost loads it"

    @hookimpl
    def init_context(self, ctx: LoadContext) -> None:
        """Tell the streaming loader how to build the model, and how to fill it."""
        from llmload.builtin.colossalai import lazy_models

        ctx.without_memory = partial(lazy_models.lazily, ctx.model_class.__name__)
        ctx.placement = lazy_models.LazyPlacement(ctx)

    @hookimpl
    def load(self, ctx: LoadContext) -> PreTrainedModel:
        """Build the model that a Booster will fill."""
        from llmload.builtin.colossalai import booster

        assert ctx.checkpoint is not None
        ctx.awaiting = _BOOSTER
        nothing = dict.fromkeys((file.path for file in ctx.checkpoint.files), 0)
        ctx.record(self.name, {"files": ctx.checkpoint.reads_per_file(nothing, nothing)})
        return booster.hand_over(ctx, ctx.model_to_fill())

    @hookimpl
    def audit(self, ctx: LoadContext, model: nn.Module) -> Iterator[Problem]:
        """Prove that a Booster will find every weight."""
        if not ctx.section(ColossalaiSection).materialize:
            from llmload.builtin.colossalai import booster

            look = booster.unfound if ctx.rehearsing else booster.audit_lazy
            yield from look(ctx, model)


def _unusable(*, materialize: bool) -> Problem | None:
    """Return what keeps the installed colossalai from doing what is asked, with the way out."""
    fix = _LAZY_ONLY if materialize else _WHOLE_STACK
    version = version_of("colossalai")
    if version is None:
        return Problem(where="colossalai", message="colossalai is not installed", fix=fix)
    from llmload.builtin.colossalai import lazy_models

    reason = lazy_models.why_not()
    if reason is None and not materialize:
        from llmload.builtin.colossalai import booster

        reason = booster.why_not()
    if reason is None:
        return None
    what = "lazy initialisation" if materialize else "a Booster"
    return Problem(
        where="colossalai",
        message=f"colossalai {version} does not give {what} here: {reason}",
        fix=fix,
    )
