"""A plugin that reads and writes values, as authors are told to, and its load on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from ranks import wholes

import llmload
from llmload.plugin import partitions


class ScaledNorm:
    """Scales the weight of the last norm, and looks at it once more in the finished model."""

    name = "scaled_norm"
    seen: float = 0.0

    class Section(llmload.Section):
        """How the last norm is scaled."""

        by: float = 2.0
        """The factor."""

    @llmload.hookimpl
    def post_load(self, ctx: llmload.LoadContext, model: Any) -> Any:
        """Scale, on all ranks alike."""
        if not ctx.rehearsing:
            norm = model.base_model.norm
            with partitions.whole(norm.parameters()), torch.no_grad():
                norm.weight.mul_(ctx.section(self.Section).by)
        return model

    @llmload.hookimpl
    def audit(self, ctx: llmload.LoadContext, model: Any) -> Iterator[llmload.Problem]:
        """Count what this rank has of the norm."""
        held = partitions.held(model.base_model.norm.weight)
        assert held is not None
        self.seen = float(held[0].sum())
        yield from ()


def scaled(spec: dict[str, Any]) -> dict[str, Any]:
    plugin = ScaledNorm()
    result = llmload.load(spec, registry=llmload.create_registry([plugin]))
    return {"values": wholes(result.model), "seen": plugin.seen}
