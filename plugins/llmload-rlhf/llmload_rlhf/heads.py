"""A head on its transformer: made, filled from the file, and held to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from llmload import Problem
from llmload.plugin import partitions
from llmload_rlhf import factors

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from llmload import LoadContext
    from llmload_rlhf.layouts import Layout


def put(
    ctx: LoadContext, layout: Layout, section: Any, base: PreTrainedModel, plugin: str
) -> nn.Module:
    """Return ``base`` with a head on it, under ZeRO-3 partitioned like it."""
    name = section.dtype or layout.dtype
    dtype = ctx.dtype if name is None else getattr(torch, name)
    with torch.device("meta") if ctx.rehearsing else nullcontext():
        head = layout.make_head(base.config, section).to(dtype)
    if not ctx.rehearsing:
        head.to(_device(base))
    head.train(base.training)
    partitions.split(head, like=base)
    if not section.new:
        ctx.from_checkpoint(head.parameters())
        if not ctx.rehearsing:
            partitions.load_state_dict(head, _stored(ctx, layout))
    head.requires_grad_(section.trainable)
    ctx.handed_on[plugin] = head
    return layout.make_model(ctx, base, head, section)


def _stored(ctx: LoadContext, layout: Layout) -> dict[str, torch.Tensor]:
    state = {part: ctx.read(key) for part, key in layout.head_keys.items()}
    if "weight" in state:
        state["weight"] = factors.of_head(ctx, layout.head, state["weight"])
    return state


def _device(base: nn.Module) -> torch.device:
    """Return the device of what the head's input comes from: the last parameter's."""
    last = list(base.parameters())[-1]
    return torch.device(last.device)


def differences(ctx: LoadContext, layout: Layout, plugin: str) -> Iterator[Problem]:
    """Find values of the head, of which this rank may hold a part, that are not the file's."""
    head: nn.Module = ctx.handed_on[plugin]
    for part, stored in _stored(ctx, layout).items():
        parameter = head.get_parameter(part)
        held = partitions.held(parameter)
        if held is None:
            continue  # on a disk
        values, start = held
        expected = stored.reshape(-1)[start : start + len(values)].to(values.dtype)
        # As bytes, so that NaN equals NaN.
        if not torch.equal(expected.view(torch.uint8), values.cpu().view(torch.uint8)):
            yield Problem(
                where=layout.head_keys[part],
                message="the head differs from the checkpoint after loading",
                fix="A plugin that runs later changed it; report this to its makers.",
            )
