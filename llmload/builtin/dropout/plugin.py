"""The plugin ``dropout``: one rate for every dropout of the base model, complete or an error.

Turning dropout off in the config alone misses models that read another field; turning it off in
the ``nn.Dropout`` modules alone misses the rates that attention passes to a function. So the rate
is set in the config before the build and in modules and attributes after it, and then a train-mode
forward proves that nothing random is left: of the model on the meta device while the plan is made,
and of the finished model. Adapters are wrapped later and keep their own dropout.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING
from weakref import WeakSet

from llmload.builtin.dropout import rates
from llmload.builtin.dropout.section import DropoutSection
from llmload.hookspecs import hookimpl
from llmload.plugin import Note, PlanError, Problem

if TYPE_CHECKING:
    from torch import nn

    from llmload.plugin import LoadContext, ProbeResult, RandomOp


class DropoutPlugin:
    """Sets and proves the dropout of the base model."""

    name = "dropout"
    stage = "training"
    Section = DropoutSection

    @hookimpl
    def check(self, ctx: LoadContext) -> Iterable[Problem | Note]:
        """Say which config fields change."""
        p = ctx.section(DropoutSection).p
        found = list(rates.of_config(ctx.config))
        changed = [f"{rate} (was {rate.value})" for rate in found if rate.under(p) != rate.value]
        try:
            _set(rates.of_config(copy.deepcopy(ctx.config)), p)
        except Exception as error:  # the config's own validation
            yield Problem(
                where="dropout.p",
                message=f"the config of {ctx.config.model_type!r} refuses {p}:"
                f" {str(error).strip().splitlines()[-1].strip()}",
                fix="Choose a rate that the model allows.",
            )
        if changed:
            yield Note(text=f"sets dropout {p} in the config: {', '.join(changed)}")
        else:
            yield Note(text=f"finds dropout {p} in the config already")

    @hookimpl
    def init_context(self, ctx: LoadContext) -> None:
        """Set the config's fields, from which the model is built."""
        _set(rates.of_config(ctx.config), ctx.section(DropoutSection).p)

    @hookimpl
    def post_load(self, ctx: LoadContext, model: nn.Module) -> nn.Module:
        """Set what the config did not reach.

        :raises PlanError: in the rehearsal, where randomness is left that nothing reaches.
        """
        from llmload.plugin import probe  # needs torch

        _set(rates.of_model(model), ctx.section(DropoutSection).p)
        # What comes later is not the base model: an adapter's dropout is its own.
        ctx.handed_on[self.name] = WeakSet(model.modules())
        if ctx.rehearsing and (problems := list(self._not_as_asked(ctx, model, probe(model)))):
            raise PlanError(problems)
        return model

    @hookimpl
    def audit(self, ctx: LoadContext, model: nn.Module) -> Iterable[Problem]:
        """Prove that the base model's forward draws at no other rate."""
        result = ctx.probe(model)
        p = ctx.section(DropoutSection).p
        ctx.record(self.name, {"p": p, "proof": result.method, "reason": result.reason})
        return self._not_as_asked(ctx, model, result)

    def _not_as_asked(
        self, ctx: LoadContext, model: nn.Module, result: ProbeResult
    ) -> Iterator[Problem]:
        p = ctx.section(DropoutSection).p
        base: WeakSet[nn.Module] = ctx.handed_on[self.name]
        if result.method == "unavailable":
            yield from _left_over(ctx, model, base, p)
            return
        wrong = [
            op
            for op in result.random_ops
            if model.get_submodule(op.module) in base and _is_wrong(op, p)
        ]
        for op in _first_of_each_kind(wrong):
            rate = "" if op.probability is None else f" at rate {op.probability}"
            yield Problem(
                where="dropout.p",
                message=f"dropout {p} is asked for, but model type {ctx.config.model_type!r}"
                f" draws{rate} in training: {op.op} in module {op.module!r} ({op.module_class})",
                fix="No config field or module attribute reaches it: change the model, or accept"
                " it and remove `dropout` from the spec.",
            )


def _set(found: Iterable[rates.Rate], p: float) -> None:
    for rate in list(found):
        new = rate.under(p)
        if new == rate.value:
            continue
        if isinstance(rate.owner, dict):
            rate.owner[rate.name] = new
        else:
            setattr(rate.owner, rate.name, new)


def _left_over(
    ctx: LoadContext, model: nn.Module, base: WeakSet[nn.Module], p: float
) -> Iterator[Problem]:
    """Find rates that were changed after ``post_load``, where no forward can be looked at."""
    from torch import nn

    for rate in rates.of_model(model):
        adapters = isinstance(rate.owner, nn.Module) and rate.owner not in base
        if not adapters and rate.under(p) != rate.value:
            yield Problem(
                where="dropout.p",
                message=f"dropout {p} is asked for, but {str(rate)!r} of model type"
                f" {ctx.config.model_type!r} is {rate.value}",
                fix="A plugin that runs after `dropout` sets it: remove that plugin, or `dropout`.",
            )


def _is_wrong(op: RandomOp, p: float) -> bool:
    """Whether an operation draws though nothing may, or drops at another rate than ``p``."""
    return p == 0.0 or op.probability not in (None, p)


def _first_of_each_kind(ops: Iterable[RandomOp]) -> Iterable[RandomOp]:
    kinds: dict[tuple[str, str, float | None], RandomOp] = {}
    for op in ops:
        kinds.setdefault((op.op, op.module_class, op.probability), op)
    return kinds.values()
