"""Run on every rank: an adapter of stacked experts over a base in parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import llmload
from llmload.plugin import partitions

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
}


def trained_and_merged(spec: dict[str, Any], merged: dict[str, Any]) -> dict[str, Any]:
    """Load in parts, train, and merge a saved adapter in parts.

    :returns: classes of the adapted layers, losses, and what of the merged model differs from the
        one that was merged whole.
    """
    import deepspeed

    torch.manual_seed(0)
    model = llmload.load(spec | {"zero3": {"config": CONFIG}}).model
    adapted = [m for m in model.modules() if type(m).__name__ == "ParallelExpertsLora"]
    parts = {partitions.is_partitioned(layer.base_layer.weight) for layer in adapted}
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
    found = []
    for _ in range(3):
        ids = torch.tensor([[1, 9, 8, 7, 6, 5, 4, 3]])
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    split = llmload.load(merged | {"zero3": {"config": CONFIG}}).model
    whole = llmload.load(merged).model
    return {
        "adapted": len(adapted),
        "parts": parts,
        "losses": found,
        "unlike": unlike(split, whole),
    }


def unlike(split: nn.Module, whole: nn.Module) -> list[str]:
    """List the parameters that differ."""
    different = []
    with partitions.whole(split.parameters()):
        pairs = zip(split.named_parameters(), whole.parameters(), strict=True)
        different += [name for (name, one), other in pairs if not torch.equal(one, other)]
    return different
