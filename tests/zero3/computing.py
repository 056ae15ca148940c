"""Run on every rank: a load under ZeRO-3 of a class whose constructor computes tensors."""

from __future__ import annotations

import os
from typing import Any

import architectures
import computed_tensors
import deepspeed
import properties
import torch

import llmload
from llmload.model import partitions, reachable


def load(folder: str, name: str, loader: str) -> dict[str, Any]:
    """Return what differs from the constructor's values on this rank, or why the load failed."""
    torch.manual_seed(int(os.environ["RANK"]))  # a rank that draws otherwise
    spec = computed_tensors.spec(folder, name) | {"zero3": {}}
    block = {"streaming"} - {loader}
    try:
        result = llmload.load(spec, registry=llmload.create_registry(block=block))
    except llmload.LlmloadError as error:
        return {"error": str(error)}
    with deepspeed.zero.GatheredParameters(list(result.model.parameters())):
        found = {path: tensor.detach().clone() for path, tensor in reachable.tensors(result.model)}
    drawn = {path: tensor.tolist() for path, tensor in found.items() if path.startswith("drawn")}
    return {
        "loader": result.report.loader,
        "partitioned": any(map(partitions.is_partitioned, result.model.parameters())),
        "different": computed_tensors.differences(folder, name, found),
        "drawn": drawn,
    }


def every(cases: list[dict[str, str]]) -> list[list[str]]:
    """List for each type what this rank finds unaccounted for once its model is whole."""
    return [_unaccounted(**case) for case in cases]


def _unaccounted(kind: str, model_type: str, folder: str) -> list[str]:
    right = dict(reachable.tensors(architectures.build(kind, model_type).eval()))
    spec = {"model": folder, "auto_class": kind, "dtype": "float32", "zero3": {}}
    try:
        model = llmload.load(spec).model
    except llmload.LlmloadError as error:
        return [f"it is refused: {error}"]
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        found = {path: tensor.detach().clone() for path, tensor in reachable.tensors(model)}
    return list(properties.differences(right, found, ()))
