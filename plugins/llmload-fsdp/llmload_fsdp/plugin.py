"""The plugin ``parallel``: a model that torch shards, with all that belongs to it inside.

Each rank reads its own rows of every tensor, and nothing else. The model is finished first
(embeddings resized, heads and adapters made, layers quantised) and sharded then, by transformers'
plan of units, so that adapters and heads lie in the units of the layers they belong to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from llmload import Conflict, Decline, Note, Problem, hookimpl
from llmload.plugin import Rendezvous, dtype_name, rank, world_size
from llmload_fsdp import sizes
from llmload_fsdp.section import ParallelSection

if TYPE_CHECKING:
    from torch import nn

    from llmload.plugin import Cost, Forecast, LoadContext
    from llmload_fsdp.session import Session
    from llmload_fsdp.units import Units

_EXAMPLES = (2, 4, 8)
"""Numbers of ranks that a plan tells of where no launcher has started any."""


class ParallelPlugin:
    """Shards with FSDP2 once the model is finished."""

    name = "parallel"
    stage = "parallel"
    Section = ParallelSection
    requires = ("torch>=2.8", "transformers>=5.24", "accelerate>=1.12")
    conflicts = (
        Conflict(
            key="device_map",
            reason="each rank has one device, and keeps its part of every weight there",
            fix="Remove `device_map`.",
        ),
        Conflict(
            key="zero3",
            reason="both split every parameter over the ranks",
            fix="Remove one of the two.",
        ),
        Conflict(
            key="colossalai",
            reason="a Booster spreads the model itself",
            fix="Remove one of the two.",
        ),
    )

    def __init__(self) -> None:
        self._sessions: WeakKeyDictionary[LoadContext, Session] = WeakKeyDictionary()
        self._ranks = Rendezvous(self.name)

    @hookimpl
    def diagnose(self) -> Iterator[Problem | Note]:
        """Import what the ranks shard with."""
        from llmload_fsdp import session  # noqa: F401 - imports what it needs

        yield Note(text="FSDP2, each rank reading its own rows")

    @hookimpl
    def check(self, ctx: LoadContext) -> Iterator[Problem | Note | Decline]:
        """Hold the sizes to the ranks and the model, and say what each rank will read and keep."""
        section = ctx.section(ParallelSection)
        found = sizes.resolve(section, ctx.machine.ranks or world_size())
        ctx.placed_by, ctx.splits = self.name, True
        if section.fsdp_mixed_precision:
            ctx.cast_later_by = "FSDP2's mixed precision"
        quantised = bool(ctx.providing("quantisation"))
        yield from sizes.dtype_problems(section, dtype_name(ctx.dtype), quantised=quantised)
        yield from _said(ctx, section, found)

    @hookimpl
    def cost(self, ctx: LoadContext, forecast: Forecast) -> Iterator[Cost]:
        """Divide the weights by rows, and count what is gathered of them to be used."""
        from llmload_fsdp import costs
        from llmload_fsdp.forecast import nobody_asks_for_it

        section = ctx.section(ParallelSection)
        found = sizes.resolve(section, ctx.machine.processes)
        assert found is not None  # the ranks are known
        if not found.shards_only:
            return  # transformers' affair: counted as whole, which no rank exceeds
        asked = ctx.checkpoint is not None and nobody_asks_for_it(ctx) is None
        yield from costs.divide(forecast, section, found, reads_rows=asked)
        yield from costs.gathered(forecast, section, ctx.handed_on[self.name].freed, found.fsdp)

    @hookimpl
    def relieve(self, ctx: LoadContext, forecast: Forecast) -> Iterator[str]:
        """Offer as many ranks as it takes."""
        from llmload_fsdp import costs
        from llmload_fsdp.forecast import nobody_asks_for_it

        planned = _units(ctx)
        if planned is None:
            return
        asked_for = self.name in ctx.active
        section = ctx.section(ParallelSection) if asked_for else ParallelSection()
        reads_rows = ctx.checkpoint is not None and nobody_asks_for_it(ctx) is None
        ranks = costs.fewest_ranks(forecast, section, planned.freed, reads_rows=reads_rows)
        if ranks is not None:
            resized = (
                section.fsdp_size and f", with `fsdp_size: {ranks // section.dp_replicate_size}`"
            )
            asked = "" if asked_for else " with `parallel: {}`"
            yield f"Load{asked} on {ranks} ranks{resized or ''}"

    @hookimpl
    def init_context(self, ctx: LoadContext) -> AbstractContextManager[Session]:
        """Gather the ranks, agree with them, and give the streaming loader its placement."""
        from llmload_fsdp.session import Session

        found = sizes.resolve(ctx.section(ParallelSection), world_size() or 1)
        assert found is not None  # the ranks are known
        session = Session(ctx, found, self._ranks)
        self._sessions[ctx] = session
        return session

    @hookimpl
    def distribute(self, ctx: LoadContext, model: nn.Module) -> nn.Module:
        """Let FSDP2 take the finished model."""
        return self._sessions[ctx].distribute(model)

    @hookimpl
    def audit(self, ctx: LoadContext, model: nn.Module) -> Iterator[Problem]:
        """Check every parameter's part."""
        yield from self._sessions.pop(ctx).audit(model)

    @hookimpl
    def started(self, asked: Mapping[str, Any]) -> None:
        """Show the other ranks that this one lives, or that it loads something else."""
        self._ranks.started(asked)

    @hookimpl
    def stopped(self, asked: Mapping[str, Any], error: BaseException) -> None:
        """Tell the other ranks, which may have planned well and wait for this one."""
        self._ranks.stopped(error, _deadline(asked[self.name]))


def _deadline(asked: Any) -> float:
    """Return the deadline that a section asks for, valid or not."""
    try:
        return ParallelSection.model_validate(asked).deadline
    except ValueError:  # it may be what is wrong; the others have another
        return ParallelSection().deadline


def _example(section: ParallelSection) -> sizes.Sizes:
    """Return sizes to plan with where no launcher has started any ranks."""
    ranks = max(_EXAMPLES) * section.dp_replicate_size * (section.tp_size or 1)
    found = sizes.resolve(section, ranks)
    assert found is not None  # the ranks are known
    return found


def _units(ctx: LoadContext) -> Units | None:
    """Return the units that FSDP2 has or would have, or None where nothing is, or can be, split by
    rows alone."""
    from llmload_fsdp import forecast, units

    if "parallel" in ctx.active:
        planned: Units | None = ctx.handed_on.get("parallel")
        return planned
    if (ctx.placed_by or ctx.spec.device_map) is not None or any(forecast.unsuited(ctx.blank)):
        return None
    section = ParallelSection()
    return units.plan(ctx.blank, _example(section).config(section))


def _said(
    ctx: LoadContext, section: ParallelSection, found: sizes.Sizes | None
) -> Iterator[Problem | Note | Decline]:
    """Say which units there will be, and what each rank reads and keeps."""
    from llmload_fsdp import forecast, units

    known = found or _example(section)
    if not known.shards_only:
        yield from forecast.others(ctx, section, known)
        return
    if section.fsdp_cpu_offload:
        yield from forecast.offload_problems(ctx)
    yield from forecast.unsuited(ctx.blank)
    planned = units.plan(ctx.blank, known.config(section))
    ctx.handed_on["parallel"] = planned
    yield Note(text=planned.said())
    if ctx.checkpoint is None:
        yield forecast.drawn_on_every_rank()
    else:
        yield from forecast.notes(ctx, found, _EXAMPLES, rank())
