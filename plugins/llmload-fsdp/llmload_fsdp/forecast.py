"""What each rank will read and keep, told beforehand from headers and the model without storage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmload import Decline, Note, Problem
from llmload.plugin import in_one_line, installed_transformers, some
from llmload_fsdp.parts import span_of

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from llmload.plugin import Accounting, LoadContext
    from llmload_fsdp.section import ParallelSection
    from llmload_fsdp.sizes import Sizes


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank will read and keep."""

    read: int
    """Bytes of the checkpoint. Tensors that transformers computes others of are read whole by every
    rank."""
    computed: int
    """Those among them."""
    kept: int
    """Bytes of its rows, tied ones once, and of the buffers."""


class Reckoning:
    """What there is to divide, counted once for any number of ranks."""

    def __init__(self, ctx: LoadContext, accounting: Accounting) -> None:
        model, version = ctx.blank, installed_transformers()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        self._computed = sum(info.nbytes for info in accounting.computed)
        self._whole = 0
        self._read: list[tuple[torch.Size, int]] = []
        for name, nbytes in accounting.stored_bytes.items():
            if name in parameters:
                self._read.append((parameters[name].shape, nbytes))
            else:
                # As many bytes as the file has for an element; the model's may be wider.
                elements = buffers[name].numel()
                self._whole += elements * nbytes // max(elements, 1)
        dtypes = version.final_dtypes(model, accounting, ctx.dtype)
        self._buffers = sum(
            b.numel() * dtypes.get(n, b.dtype).itemsize for n, b in model.named_buffers()
        )
        # A tied name is the parameter of another, and takes no memory of its own.
        tied = version.tied_names(model)
        self._kept = [
            (parameter.shape, dtypes.get(name, ctx.dtype).itemsize)
            for name, parameter in parameters.items()
            if name not in tied
        ]

    def share(self, rank: int, ranks: int) -> Share:
        """Say what a rank will read and keep."""
        read = self._computed + self._whole
        for shape, nbytes in self._read:
            read += span_of(shape, rank, ranks).length * nbytes // max(shape.numel(), 1)
        kept = self._buffers
        for shape, itemsize in self._kept:
            kept += span_of(shape, rank, ranks).length * itemsize
        return Share(read, self._computed, kept)


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


def offload_problems(ctx: LoadContext) -> Iterator[Problem]:
    """Refuse to offload to where everything is: FSDP2 fails, without a word of why."""
    if not ctx.machine.is_accelerated:
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
    reckoning, total = Reckoning(ctx, ctx.accounting(ctx.blank)), ctx.checkpoint.total_bytes
    ctx.reads = f"a rank's part of {total:,} bytes"
    if sizes is not None:
        own = reckoning.share(rank % sizes.fsdp, sizes.fsdp)
        ctx.reads = f"{own.read:,} of {total:,} bytes"
    for number in examples if sizes is None else (sizes.fsdp,):
        told = reckoning.share(0, number)
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
