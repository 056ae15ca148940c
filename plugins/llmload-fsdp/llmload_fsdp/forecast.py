"""What each rank will read and keep, told beforehand from headers and the model without storage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmload import Decline, Note, Problem
from llmload.plugin import Span, in_one_line, installed_transformers, some
from llmload_fsdp.parts import span_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from llmload.plugin import Accounting, LoadContext
    from llmload_fsdp.section import ParallelSection
    from llmload_fsdp.sizes import Sizes


@dataclass(frozen=True, slots=True)
class Forecast:
    """What one rank will read and keep."""

    read: int
    """Bytes of the checkpoint. Tensors that transformers computes others of are read whole by every
    rank."""
    computed: int
    """Those among them."""
    kept: int
    """Bytes of its rows, tied ones once, and of the buffers."""


def forecast(ctx: LoadContext, accounting: Accounting, rank: int, ranks: int) -> Forecast:
    """Say what a rank will read and keep."""
    model = ctx.blank
    computed = sum(info.nbytes for info in accounting.computed)
    read = computed
    stored = {name: info.nbytes for name, info in accounting.as_stored.items()}
    state = model.state_dict()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, nbytes in (stored | dict(accounting.assembled)).items():
        shape, elements = state[name].shape, state[name].numel()
        split = name in parameters
        span = span_of(shape, rank, ranks) if split else Span.of(elements, 0, 1)
        # As many bytes as the checkpoint has for an element; what the model will have may be wider.
        read += span.length * nbytes // max(elements, 1)
    tied = installed_transformers().tied_names(model)
    dtypes = installed_transformers().final_dtypes(model, accounting, ctx.dtype)
    kept = sum(b.numel() * dtypes.get(n, b.dtype).itemsize for n, b in model.named_buffers())
    for name, parameter in parameters.items():
        # A tied name is the parameter of another, and takes no memory of its own.
        if name not in tied:
            dtype = dtypes.get(name, ctx.dtype)
            kept += span_of(parameter.shape, rank, ranks).length * dtype.itemsize
    return Forecast(read, computed, kept)


def unsuited(model: nn.Module) -> Iterator[Problem]:
    """Refuse parameters that FSDP2 cannot split: single numbers."""
    scalars = [name for name, parameter in model.named_parameters() if not parameter.ndim]
    if scalars:
        yield Problem(
            where="parallel",
            message=f"FSDP2 splits rows, and {some(scalars)} have none: they are single numbers",
            fix="Load this architecture without `parallel`, or with `zero3`.",
        )


_AFTERWARDS = {
    "adapter": "an adapter put around layers that are split already stays whole on every rank",
    "embeddings": "embeddings that are split already cannot be resized",
    "quantisation": "transformers splits no layer that is quantised",
}
"""Ability of another plugin -> why it does not go with layers that several ranks compute."""


def others(
    ctx: LoadContext, section: ParallelSection, sizes: Sizes
) -> Iterator[Problem | Note | Decline]:
    """Say that transformers splits the layers while it loads, and refuse what comes too late."""
    for ability, reason in _AFTERWARDS.items():
        for name in ctx.providing(ability):
            yield Problem(
                where=name,
                message=f"with tensor or expert parallel, {reason}",
                fix=f"Remove `{name}`, or shard with `fsdp_size` alone.",
            )
    if ctx.checkpoint is None:
        yield Problem(
            where="weights",
            message="with tensor or expert parallel, each rank would draw weights of its own",
            fix="Load a checkpoint, or shard with `fsdp_size` alone.",
        )
    yield from _plan_problems(ctx.blank, sizes.config(section))
    for loader in ctx.providing("placement"):
        yield Decline("from_pretrained splits layers and experts while it loads", loader=loader)
    yield Note(
        text=f"from_pretrained splits layers over {sizes.tp} ranks and experts over"
        f" {sizes.ep}, in {sizes.dp_replicate * sizes.fsdp} parts of the data"
    )


def _plan_problems(model: PreTrainedModel, config: Any) -> Iterator[Problem]:
    try:
        model._resolve_parallel_plans(config)
    except (OSError, ValueError) as error:
        yield Problem(
            where="parallel",
            message=f"transformers refuses the plan: {in_one_line(error).rstrip('.')}",
            fix="Change what it names, or shard with `fsdp_size` alone.",
        )


def offload_problems() -> Iterator[Problem]:
    """Refuse to offload to where everything is: FSDP2 fails, without a word of why."""
    import torch

    if not torch.accelerator.is_available():
        yield Problem(
            where="parallel.fsdp_cpu_offload",
            message="there is no accelerator, so that everything is in host memory as it is",
            fix="Remove it.",
        )


def notes(
    ctx: LoadContext, sizes: Sizes | None, examples: Sequence[int], rank: int
) -> Iterator[Note | Problem]:
    """Say how much of the checkpoint each rank reads, and what it keeps."""
    assert ctx.checkpoint is not None
    reason = nobody_asks_for_it(ctx)
    if reason:
        yield _whole_on_every_rank(reason, ctx.checkpoint.total_bytes)
        return
    if ctx.providing("quantisation"):  # which says it
        return
    accounting, total = ctx.accounting(ctx.blank), ctx.checkpoint.total_bytes
    ctx.reads = f"a rank's part of {total:,} bytes"
    if sizes is not None:
        own = forecast(ctx, accounting, rank % sizes.fsdp, sizes.fsdp)
        ctx.reads = f"{own.read:,} of {total:,} bytes"
    for number in examples if sizes is None else (sizes.fsdp,):
        told = forecast(ctx, accounting, 0, number)
        computed = ""
        if told.computed:
            computed = f" ({told.computed:,} of tensors that others are computed of, whole)"
        yield Note(
            text=f"each of {number} ranks reads at most {told.read:,} of {total:,} bytes{computed}"
            f" and keeps {told.kept:,}"
        )


def drawn_on_every_rank() -> Problem:
    """Return the warning of random weights."""
    return Problem(
        where="parallel",
        severity="warning",
        message="every rank builds the whole model and gives away what it does not keep: random"
        " weights are drawn, not read",
        fix="Load a checkpoint to have each rank read its part.",
    )


def nobody_asks_for_it(ctx: LoadContext) -> str | None:
    """Return why no loader will ask for our placement, or None."""
    loaders = ctx.providing("placement")
    if not loaders:
        return "no plugin is selected that asks where each weight is stored, as `streaming` does"
    reasons = [ctx.declined.get(name) for name in loaders]
    return None if None in reasons else reasons[0]


def _whole_on_every_rank(reason: str, nbytes: int) -> Problem:
    return Problem(
        where="parallel",
        severity="warning",
        message=f"every rank loads all {nbytes:,} bytes and gives away what it does not keep:"
        f" {reason}",
        fix="Save the checkpoint as safetensors, unquantised, to have each rank read its part.",
    )
