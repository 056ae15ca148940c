"""The load without storage: what the hooks make of the model on the meta device, written down."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmload.errors import LoadFailedError, Problem, RequestError
from llmload.hf import deepspeed, installed_transformers
from llmload.loading import hook_calls
from llmload.loading.makers import Ledger
from llmload.model import partitions

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from llmload.context.context import LoadContext
    from llmload.context.switch import AdapterSwitch
    from llmload.host.registry import Host
    from llmload.loading.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What came of the load on the meta device."""

    model: nn.Module
    """The finished model."""
    base: dict[str, nn.Parameter]
    """Every name in the base model, tied ones included -> its parameter as the loader made it."""
    shapes: dict[str, tuple[int, ...]]
    """Every name in the base model -> the shape that its parameter had before any hook."""
    changed_base: dict[str, str]
    """What the hooks said of the parameters that they change: see ``ctx.changed_base``."""
    merged_into: dict[str, str]
    """What the hooks said of the parameters that they write to: see ``ctx.merged_into``."""
    switch: AdapterSwitch | None
    """Turns off an adapter that is not PEFT's: see ``ctx.adapter_switch``."""
    ctx: LoadContext
    """With what the rehearsal recorded."""
    parameters: dict[str, nn.Parameter]
    """Of the finished model by name, tied ones once."""
    apart: set[str]
    """Names of tied parameters that the rehearsed model, which was not tied, has of its own."""
    wider: set[str]
    """Names in the base model of parameters that the loader leaves in float32."""

    def kept(self) -> set[str]:
        """Return the names in the base model of the parameters that the finished model still has as
        they were, and does not train."""
        frozen = {id(p) for p in self.model.parameters() if not p.requires_grad}
        still = {name for name, parameter in self.base.items() if id(parameter) in frozen}
        return still - self.written()

    def written(self) -> set[str]:
        """Return the names in the base model of the parameters that the load itself writes to, or
        puts others in place of."""
        changed = self.changed_base.keys() | self.merged_into.keys()
        named = dict(self.model.named_parameters(remove_duplicate=False))
        touched = {id(named[name]) for name in changed if name in named}
        untouched = {id(parameter) for parameter in named.values()} - touched
        return {name for name, parameter in self.base.items() if id(parameter) not in untouched}

    def loaded_itemsize(self, names: Iterable[str], parameter: nn.Parameter) -> int:
        """Return the bytes of an element of a base parameter as the loader leaves it."""
        if not parameter.is_floating_point():
            return parameter.element_size()
        return 4 if self.wider.intersection(names) else self.ctx.dtype.itemsize

    def itemsize(self, parameter: nn.Parameter) -> int:
        """Return the bytes of an element of a base parameter in the finished model.

        The blank model is all in ``ctx.dtype``. Placements with one dtype for all (DeepSpeed's)
        undo even what a hook widened; else what stays float32 takes four bytes, unless a hook has
        cast it.
        """
        dtype = self.ctx.dtype
        if self.ctx.one_dtype and parameter.is_floating_point():
            return dtype.itemsize
        kept = id(parameter) in self._kept_wider
        return 4 if kept and parameter.dtype == dtype else parameter.element_size()

    @cached_property
    def _kept_wider(self) -> set[int]:
        return {id(self.base[name]) for name in self.wider if name in self.base}

    def is_plain(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter is the base's as the loader made it, of the same shape, and plain."""
        shape = self._shapes.get(id(parameter))
        return shape == tuple(parameter.shape) and not partitions.wraps(parameter)

    @cached_property
    def _shapes(self) -> dict[int, tuple[int, ...]]:
        return {id(self.base[name]): shape for name, shape in self.shapes.items()}


def rehearse(host: Host, ctx: LoadContext, plan: Plan) -> Rehearsal | None:
    """Run ``post_load`` and ``wrap_adapter`` on the meta device and write down what comes out.

    A hook that cannot run there is a warning, and the plan then promises no trainable parameters.

    :param ctx: with what was found; the rehearsal records in one of its own.
    """
    import torch

    found, ctx = ctx, ctx.for_run(rehearsing=True)
    ledger = Ledger(ctx)
    try:
        model: Any = ctx.blank
        base = dict(model.named_parameters(remove_duplicate=False))
        plan.frozen = [name for name, parameter in base.items() if not parameter.requires_grad]
        # The blank model is not tied: each name of a tied weight is a parameter of its own there,
        # and would be counted twice. `still_apart` are those names, for as long as that is so.
        tied = still_apart = installed_transformers().tied_names(ctx.blank) - ctx.apart
        wider = _kept_in_float32(ctx)
        shaping = host.shaping("post_load") or host.shaping("wrap_adapter")
        # Hooks must find the model as the load will hand it to them, tied.
        if shaping or (tied and not ctx.spec.trainable):
            model = ctx.take_blank()
            model.tie_weights()
            _keep_apart(model, ctx.apart)
            base = dict(model.named_parameters(remove_duplicate=False))
            still_apart = set()
            ledger.take_stock(plan.loader, model)
        shapes = {name: tuple(parameter.shape) for name, parameter in base.items()}
        # Otherwise it is frozen at most, as the load does too: the loader may still fill it.
        # Adapters draw their first values; the caller's random stream must not move.
        # Nor may transformers or PEFT look for DeepSpeed: on meta tensors there is nothing to
        # gather.
        with torch.random.fork_rng(devices=[]), deepspeed.hidden():
            model, plan.declined_adapters = hook_calls.finish(
                host, ctx, model, lambda hook, plugin: nullcontext(), ledger.take_stock
            )
    except RequestError as error:
        # A plugin may say in wrap_adapter again what it said in check.
        plan.problems += [p for p in error.problems if p not in plan.problems]
        return None
    except LoadFailedError as error:
        plan.problems.append(
            Problem(
                severity="warning",
                message=f"the load could not be rehearsed on the meta device, so the plan promises"
                f" no trainable parameters: {error}",
            )
        )
        return None
    finally:
        plan.facts = {name: dict(facts) for name, facts in found.facts.items()}
        # What `check` found is kept for the load; what this run records must not get into it.
        for name, facts in ctx.facts.items():
            plan.facts.setdefault(name, {}).update(facts)
        plan.lines = [*found.lines, *ctx.lines]
    unique = {name: p for name, p in model.named_parameters() if name not in still_apart}
    rehearsal = Rehearsal(
        model=model,
        base=base,
        shapes=shapes,
        changed_base=ledger.changed_base(),
        merged_into=ledger.merged_into(),
        switch=ctx.adapter_switch,
        ctx=ctx,
        parameters=unique,
        apart=still_apart,
        wider=wider,
    )
    # By identity: an adapter renames parameters, a resize replaces them, and one that was replaced
    # has the dtype that the hook gave it.
    plan.parameters = sum(partitions.values(p) for p in unique.values())
    plan.parameter_bytes = sum(
        p.numel() * rehearsal.itemsize(p) if rehearsal.is_plain(p) else partitions.nbytes(p)
        for p in unique.values()
    )
    plan.trainable = sum(partitions.values(p) for p in unique.values() if p.requires_grad)
    plan.trainable_parameters = [name for name, p in unique.items() if p.requires_grad]
    plan.tied = sorted(tied)
    # First what the load will initialise because the checkpoint lacks it, then what hooks made or
    # call new, which goes before: a resized embedding is its plugin's.
    by_loader = {name: plan.loader for name in unique if name in ctx.to_initialise}
    plan.new_parameters = by_loader | ledger.foretold(model, plan.loader)
    return rehearsal


def _keep_apart(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Give parameters that are tied a place of their own."""
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        tied = module.get_parameter(attribute)
        setattr(module, attribute, type(tied)(tied.data, requires_grad=tied.requires_grad))


def _kept_in_float32(ctx: LoadContext) -> set[str]:
    """Return names of the base model that a load leaves float32, which the blank does not show."""
    unsuited = installed_transformers().unsuited() is not None
    if ctx.checkpoint is None or ctx.one_dtype or unsuited:
        return set()
    found: set[str] = installed_transformers().kept_in_float32(ctx.blank, ctx.dtype)
    return found
