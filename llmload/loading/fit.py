"""How the checkpoint fits the model, said in the plan: all that headers and config tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmload.checkpoint.accounting import as_quantised
from llmload.errors import CheckpointError, Problem
from llmload.hf import generation, installed_transformers, quantised
from llmload.loading import audit

if TYPE_CHECKING:
    from llmload.checkpoint.accounting import Accounting
    from llmload.context.context import LoadContext

_ELSEWHERE = ("fusion_config", "transformers_weights")
"""Keys of a config by which transformers reads other tensors than those of the checkpoint."""


def problems(ctx: LoadContext) -> Iterator[Problem]:
    """Yield what of the checkpoint does not fit the model, for every loader alike.

    For after all plugins' ``check``, which say what need not be in the checkpoint.

    :raises CheckpointError: the model cannot be built.
    """
    if ctx.checkpoint is None:
        return
    config = ctx.config
    stored = quantised.declared(config)
    if stored is not None and not quantised.by_bitsandbytes(stored):  # which has its own section
        yield from quantised.problems(config, ctx.spec, ctx.dtype)
    yield from generation.problems(ctx.folder, ctx.model_class)
    if installed_transformers().unsuited() is not None:
        return
    if any(getattr(config, key, None) is not None for key in _ELSEWHERE):
        return
    if getattr(type(config), "extra_files", ()):
        return
    found = ctx.accounting(ctx.blank)
    if stored is not None:
        found = as_quantised(ctx.blank, found)
    for name, trace in found.failed.items():
        reason = trace.splitlines()[-1].removeprefix("Error: ")
        yield Problem(
            where=name,
            message=f"transformers cannot make it of the checkpoint's tensors: {reason}",
            fix="Check that config.json and weights belong together.",
        )
    yield from found.misfits()
    yield from _keys(ctx, found)


def _keys(ctx: LoadContext, found: Accounting) -> Iterator[Problem]:
    """Hold the names to ``strict``, as the load will."""
    record = (dict(ctx.newly_initialised), list(ctx.unexpected))
    ctx.newly_initialised |= dict.fromkeys(found.missing, audit.MISSING)
    ctx.unexpected += found.unexpected
    try:
        audit.hold_to_strict(ctx)
        yield from audit.excused(ctx)
    except CheckpointError as error:
        yield from error.problems
    finally:
        ctx.newly_initialised, ctx.unexpected = record
