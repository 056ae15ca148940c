"""The plugin ``zero3``: a model partitioned by DeepSpeed ZeRO-3 while it is loaded.

transformers has rank 0 read the checkpoint and send every tensor whole to all ranks. Here each rank
reads its own part of each tensor from the mapped files, and nothing is sent but the few weights
that the checkpoint lacks. Where DeepSpeed itself must partition (``DeepSpeedConfig.beyond_us``) or
the streaming loader declines, ``from_pretrained`` does it under the same plan and report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from llmload.builtin.zero3 import config
from llmload.builtin.zero3.section import Zero3Section
from llmload.hookspecs import hookimpl
from llmload.plugin import (
    Conflict,
    Decline,
    Note,
    Problem,
    Rendezvous,
    RequestError,
    dtype_name,
    rank,
    world_size,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from llmload.builtin.zero3.config import DeepSpeedConfig
    from llmload.builtin.zero3.loading_session import Session
    from llmload.plugin import Cost, Forecast, LoadContext


_EXAMPLES = (2, 4, 8)
"""Numbers of ranks that a plan tells of where no launcher has started any."""
_BEFORE = "Load the checkpoint from before it was quantised, with `kbit` if it is to be."


def _partitions(section: Any, other: Any) -> bool:
    return config.stage_of(section) == 3


class Zero3Plugin:
    """Partitions with DeepSpeed, and keeps DeepSpeed's global state to the length of one load."""

    name = "zero3"
    stage = "parallel"
    Section = Zero3Section
    requires = ("deepspeed>=0.19.4", "accelerate>=1.3")
    conflicts = (
        Conflict(
            key="device_map",
            reason="DeepSpeed chooses the device of each partition",
            fix="Remove `device_map`.",
            when=_partitions,
        ),
    )

    def __init__(self) -> None:
        self._sessions: WeakKeyDictionary[LoadContext, Session] = WeakKeyDictionary()
        self._ranks = Rendezvous(self.name)

    @hookimpl
    def diagnose(self) -> Iterator[Problem | Note]:
        """Import DeepSpeed, and what of it each rank places its partitions with."""
        from llmload.builtin.zero3 import loading_session  # noqa: F401 - imports what it needs

        yield Note(text="ZeRO stage 3, each rank reading its own part")

    @hookimpl
    def check(self, ctx: LoadContext) -> Iterator[Problem | Note | Decline]:
        """Resolve the DeepSpeed config, and say what each rank will read and keep."""
        from llmload.builtin.zero3 import disk

        resolved = _resolve(ctx)
        ctx.handed_on[self.name] = resolved
        ctx.cast_later_by = "DeepSpeed"
        if resolved.stage < 3:
            yield Note(text=f"ZeRO stage {resolved.stage}: the model stays whole")
            yield Decline(f"ZeRO stage {resolved.stage} does not partition parameters")
            return
        ctx.placed_by, ctx.splits, ctx.one_dtype = self.name, True, True
        problem = config.precision_problem(resolved, dtype_name(ctx.dtype))
        if problem:
            yield problem
        yield from disk.problems(resolved)
        if resolved.left:
            yield Note(text=f"`auto` is left to the training loop: {', '.join(resolved.left)}")
        whole = _kept_whole(ctx, resolved)
        if whole is not None:
            yield whole
        if ctx.checkpoint is not None and getattr(ctx.config, "quantization_config", None):
            return
        reason = resolved.beyond_us()
        if reason:
            if whole is None:
                yield Note(text=f"rank 0 reads and from_pretrained partitions: {reason}")
            for loader in ctx.providing("placement"):
                yield Decline(f"DeepSpeed partitions: {reason}", loader=loader)
        elif ctx.checkpoint is not None and not ctx.providing("quantisation"):  # which says it
            for text in _forecasts(ctx, rank(), ctx.machine.ranks or world_size()):
                yield Note(text=text)

    @hookimpl
    def check_lora(
        self, ctx: LoadContext, section: Any, fields: Mapping[str, Any]
    ) -> Iterator[Problem]:
        """Refuse rows to train where PEFT cannot share them among the ranks."""
        resolved = ctx.handed_on.get(self.name)
        if resolved is not None and resolved.stage == 3 and fields.get("trainable_token_indices"):
            yield from _rows_without_gpu()

    @hookimpl
    def cost(self, ctx: LoadContext, forecast: Forecast) -> Iterator[Cost]:
        """Divide the weights, and count what DeepSpeed gathers and lays out.

        :raises RequestError: plugins leave trainable parameters of several dtypes, as the rehearsed
            model tells.
        """
        from llmload.builtin.zero3 import costs
        from llmload.builtin.zero3.loading_session import mixed_dtypes

        resolved: DeepSpeedConfig = ctx.handed_on[self.name]
        if resolved.stage < 3:
            return
        trained = _trained_dtypes(ctx, forecast)
        if len(trained) > 1:
            raise RequestError([mixed_dtypes(trained)])
        by_us = resolved.beyond_us() is None and _nobody_asks_for_it(ctx) is None
        ranks = ctx.machine.processes if _kept_whole(ctx, resolved) is None else 1
        costs.divide(forecast, resolved, ranks, by_us=by_us)
        yield from costs.costs(forecast, resolved)

    @hookimpl
    def relieve(self, ctx: LoadContext, forecast: Forecast) -> Iterator[str]:
        """Offer as many ranks as it takes."""
        from llmload.builtin.zero3 import costs

        resolved = ctx.handed_on.get(self.name) or config.plain(dtype_name(ctx.dtype))
        asked_for = self.name in ctx.active
        if resolved.stage < 3 or (asked_for and _kept_whole(ctx, resolved) is not None):
            return
        if not asked_for and (ctx.placed_by or ctx.spec.device_map) is not None:
            return  # another plugin has them, or several devices

        def divide(tried: Forecast) -> None:
            costs.divide(tried, resolved, tried.machine.processes, by_us=True)

        ranks = forecast.fewest_ranks(divide)
        if ranks is not None:
            asked = "" if asked_for else " with `zero3: {}`"
            yield f"Load{asked} on {ranks} ranks"

    @hookimpl
    def init_context(self, ctx: LoadContext) -> AbstractContextManager[Session]:
        """Gather the ranks, agree with them, and give the streaming loader its placement."""
        from llmload.builtin.zero3.loading_session import Session

        session = Session(ctx, ctx.handed_on[self.name], self._ranks)
        self._sessions[ctx] = session
        return session

    @hookimpl
    def load(self, ctx: LoadContext) -> PreTrainedModel:
        """Let ``from_pretrained`` partition, where the streaming loader does not."""
        from llmload.plugin import from_pretrained

        session = self._sessions[ctx]
        session.activate()
        model = from_pretrained(ctx)
        session.loaded(model)
        return model

    @hookimpl
    def audit(self, ctx: LoadContext, model: nn.Module) -> Iterator[Problem]:
        """Check every partition."""
        foretold = _kept_whole(ctx, ctx.handed_on[self.name]) is not None
        yield from self._sessions.pop(ctx).audit(model, foretold=foretold)

    @hookimpl
    def started(self, asked: Mapping[str, Any]) -> None:
        """Show the other ranks that this one lives, or that it loads something else."""
        splits = self.name in asked and _stage(asked[self.name])[0] == 3
        self._ranks.started(asked, splits=splits)

    @hookimpl
    def stopped(self, asked: Mapping[str, Any], error: BaseException) -> None:
        """Tell the other ranks, which may have planned well and wait for this one."""
        stage, deadline = _stage(asked[self.name])
        self._ranks.stopped(error, deadline, splits=stage == 3)


def _trained_dtypes(ctx: LoadContext, forecast: Forecast) -> set[str]:
    """Return the dtypes that trainable parameters will have."""
    found = set()
    for weight in forecast.weights.values():
        if weight.trained:
            # What a hook has cast of the base model, the placement stores in the model's dtype.
            as_rehearsed = weight.parameter.element_size() == weight.itemsize
            found.add(dtype_name(weight.parameter.dtype if as_rehearsed else ctx.dtype))
    return found


def _rows_without_gpu() -> Iterator[Problem]:
    import torch

    if not torch.cuda.is_available():
        yield Problem(
            where="lora.trainable_token_indices",
            message="under ZeRO-3 PEFT shares rows to train among the ranks by a GPU, and there is"
            " none",
            fix="Load without `zero3`, or where there are GPUs.",
        )


def _stage(asked: Any) -> tuple[int, float]:
    """Return stage and deadline that a section asks for, valid or not."""
    try:
        section = Zero3Section.model_validate(asked)
        return config.stage_of(section), section.deadline
    except Exception:  # it may be what is wrong; the others have another
        return 3, Zero3Section().deadline


def _resolve(ctx: LoadContext) -> DeepSpeedConfig:
    from transformers.integrations.deepspeed import deepspeed_config

    text = ctx.config.get_text_config()
    hidden = getattr(text, "hidden_size", None)
    if hidden is None and hasattr(text, "hidden_sizes"):
        hidden = max(text.hidden_sizes)
    announced = deepspeed_config()
    return config.resolve(ctx.section(Zero3Section), dtype_name(ctx.dtype), hidden, announced)


def _kept_whole(ctx: LoadContext, resolved: DeepSpeedConfig) -> Problem | None:
    """Return the warning that nothing will be partitioned: quantised weights are not where
    ``from_pretrained`` loads them."""
    if ctx.checkpoint is None:
        return None
    what, fix = "is quantised in the checkpoint", _BEFORE
    if not getattr(ctx.config, "quantization_config", None):
        reason = resolved.beyond_us() or _nobody_asks_for_it(ctx)
        if reason is None or not ctx.providing("quantisation"):
            return None
        what = "it quantises"
        fix = f"Let `streaming` load it, which gives each rank its part, but not here: {reason}."
    return Problem(
        where="zero3",
        severity="warning",
        message=f"from_pretrained does not partition what {what}: every rank reads all"
        f" {ctx.checkpoint.total_bytes:,} bytes and holds the whole model until DeepSpeed's"
        " `initialize`",
        fix=fix,
    )


def _forecasts(ctx: LoadContext, rank: int, ranks: int | None) -> Iterator[str]:
    """Say how much of the checkpoint each rank reads, and what it keeps."""
    from llmload.builtin.zero3.parts import share

    assert ctx.checkpoint is not None
    reason = _nobody_asks_for_it(ctx)
    if reason:
        yield f"rank 0 reads and from_pretrained partitions: {reason}"
        return
    accounting = ctx.accounting(ctx.blank)
    total = ctx.checkpoint.total_bytes
    if ranks is None:
        yield "each rank reads and keeps its own part of every tensor"
        ctx.reads = f"a rank's part of {total:,} bytes"
    else:
        ctx.reads = f"{share(ctx, accounting, rank, ranks).read:,} of {total:,} bytes"
    for number in _EXAMPLES if ranks is None else (ranks,):
        expected = share(ctx, accounting, 0, number)
        computed = ""
        if expected.computed:
            computed = f" ({expected.computed:,} of tensors that others are computed of, whole)"
        yield (
            f"each of {number} ranks reads {expected.read:,} of {total:,} bytes{computed}"
            f" and keeps {expected.kept:,}"
        )


def _nobody_asks_for_it(ctx: LoadContext) -> str | None:
    """Return why no loader will ask for our placement, or None."""
    loaders = ctx.providing("placement")
    if not loaders:
        return "no plugin is selected that asks where each weight is stored, as `streaming` does"
    reasons = [ctx.declined.get(name) for name in loaders]
    return None if None in reasons else reasons[0]
