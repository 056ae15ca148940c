"""The plugin ``cast``: another dtype than the model's for some of its modules."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from llmload.builtin.cast.section import CastSection
from llmload.hookspecs import hookimpl
from llmload.plugin import Conflict, Cost, Note, PlanError, Problem, dtype_name, patterns

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmload.plugin import Forecast, LoadContext


class CastPlugin:
    """Casts parameters and floating-point buffers of the finished base model; no adapter's."""

    name = "cast"
    stage = "dtype"
    audits_rehearsal = True
    Section = CastSection
    conflicts = (
        Conflict(
            ability="quantisation",
            reason="which weights are codes, and must not be cast, is known there",
            fix="Remove `cast`; `kbit` has a key `cast` of its own.",
        ),
        Conflict(
            key="zero3",
            reason="DeepSpeed decides in which dtype it keeps the parts of a parameter",
            fix="Remove `cast`.",
        ),
        Conflict(
            key="colossalai",
            reason="a Booster gives all parameters the dtype of its plugin",
            fix="Remove `cast`.",
        ),
    )

    @hookimpl
    def check(self, ctx: LoadContext) -> Iterator[Note]:
        """Say what is cast."""
        for pattern, dtype in ctx.section(CastSection).modules.items():
            yield Note(text=f"modules with {pattern!r} in their names in {dtype}")

    @hookimpl
    def post_load(self, ctx: LoadContext, model: nn.Module) -> nn.Module:
        """Cast in place.

        :raises PlanError: in the rehearsal, where a pattern is found in no module's name.
        """
        rules = ctx.section(CastSection).modules
        counts = dict.fromkeys(rules, 0)
        cast = []
        for name, tensor, pattern in _matches(model, rules):
            counts[pattern] += 1
            dtype = _torch_dtype(rules[pattern])
            tensor.data = tensor.data.to(dtype)
            cast.append((name, weakref.ref(tensor), dtype))
        if ctx.rehearsing:
            _refuse_unmatched(model, counts)
        ctx.handed_on[self.name] = cast
        ctx.record(self.name, {"tensors": counts})
        return model

    @hookimpl
    def cost(self, ctx: LoadContext, forecast: Forecast) -> Iterator[Cost]:
        """Say which weights are cast once they are loaded, one after the other."""
        cast = {id(reference()) for _, reference, _ in ctx.handed_on[self.name]}
        before = [0]
        for weight in forecast.weights.values():
            if id(weight.parameter) in cast and weight.parameter.dtype != ctx.dtype:
                weight.route, weight.on_pages = "cast", False
                weight.why = f"the section `cast` has it in {dtype_name(weight.parameter.dtype)}"
                before.append(weight.part(weight.loaded))
        yield Cost(what="one weight while it is cast", nbytes=max(before), phase="finish")

    @hookimpl
    def audit(self, ctx: LoadContext, model: nn.Module) -> Iterable[Problem]:
        """Check that what was cast still has its dtype."""
        held = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        for name, reference, dtype in ctx.handed_on[self.name]:
            tensor = reference()
            if tensor is not None and id(tensor) in held and tensor.dtype != dtype:
                yield Problem(
                    where="cast.modules",
                    message=f"{name!r} is {dtype_name(tensor.dtype)},"
                    f" {dtype_name(dtype)} was planned",
                    fix="A plugin after `cast` changed it; report this to its makers.",
                )


def _matches(model: nn.Module, rules: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor, str]]:
    """Yield each tensor to cast once, with its name and the rule that holds for it."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        pattern = next((rule for rule in rules if patterns.search(rule, path)), None)
        if pattern is None:
            continue
        for held in (module.named_parameters, module.named_buffers):
            for name, tensor in held(recurse=False):
                if tensor.is_floating_point() and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{path}.{name}", tensor, pattern


def _refuse_unmatched(model: nn.Module, counts: Mapping[str, int]) -> None:
    problems = [
        Problem(
            where="cast.modules",
            message=f"no module of {type(model).__name__} that holds floating-point tensors has"
            f" {pattern!r} in its name",
            fix="Remove the rule, or write part of a name as `named_modules()` gives it.",
        )
        for pattern, count in counts.items()
        if not count
    ]
    if problems:
        raise PlanError(problems)


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
