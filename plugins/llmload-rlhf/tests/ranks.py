"""Run on every rank: a load under ZeRO-3, and a save."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from making import load

import llmload
from llmload.plugin import partitions
from llmload_rlhf.models import whole_state

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def load_and_save(
    folder: str, case: tuple[str, str], new: bool, keys: dict[str, Any]
) -> dict[str, Any]:
    """Load, say what the head holds once it is whole, and save in the system's files."""
    torch.manual_seed(int(torch.distributed.is_initialized()))
    zero3 = {"config": CONFIG}
    result = load(
        Path(folder), (case[0], case[1]), head_new=new, dtype="float32", zero3=zero3, **keys
    )
    model = result.model
    parameters = list(model.parameters())
    partitioned = sum(map(partitions.is_partitioned, parameters))
    with partitions.whole(model.head.parameters()):
        head = {name: value.tolist() for name, value in model.head.state_dict().items()}
    state = whole_state(model)
    out = Path(folder + "-out")
    model.save_pretrained(out)
    whole = out / "whole.bin"
    if state:
        torch.save(state, whole)
    return {
        "head": head,
        "partitioned": partitioned,
        "parameters": len(parameters),
        "whole": str(whole),
    }


def load_policy(spec: dict[str, Any]) -> dict[str, Any]:
    """Load a policy, and return its head once it is whole."""
    model = llmload.load(spec | {"zero3": {"config": CONFIG}}).model
    partitioned = all(map(partitions.is_partitioned, model.parameters()))
    with partitions.whole([model.lm_head.weight]):
        return {"partitioned": partitioned, "head": model.lm_head.weight.tolist()}
