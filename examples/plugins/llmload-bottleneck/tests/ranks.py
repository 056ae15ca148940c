"""What runs on every rank of a test."""

from __future__ import annotations

from typing import Any

import torch

import llmload
from llmload.plugin import partitions
from llmload.testing import IDS
from llmload_bottleneck import save
from llmload_bottleneck.layers import weights

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
}


def train_and_save(spec: dict[str, Any], folder: str, resumed: str) -> dict[str, Any]:
    """Train a partitioned model for two steps, save the adapter, resume it, and save that."""
    import deepspeed

    result = llmload.load(spec | {"zero3": {"config": CONFIG}})
    adapter = weights(result.model)
    told = {
        "planned": result.plan.trainable,
        "partitioned": all(partitions.is_partitioned(p) for p in result.model.parameters()),
        "parameters": sum(partitions.elements(p) for p in adapter.values()),
    }
    engine, *_ = deepspeed.initialize(model=result.model, config=CONFIG)
    losses = []
    for _ in range(2):
        loss = engine(input_ids=IDS, labels=IDS).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    save(engine.module, folder)
    engine.destroy()
    torch.distributed.barrier()
    again = spec | {"bottleneck": {"adapter": folder}, "zero3": {"config": CONFIG}}
    save(llmload.load(again).model, resumed)
    return told | {"losses": losses}
