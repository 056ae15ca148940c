"""Run on every rank: a load of what the hub has, and the same from a whole folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

import llmload
from llmload import testing
from llmload.model.partitions import held


def load(model: str, folder: str, caches: list[str], **keys: Any) -> dict[str, Any]:
    """Take part of the ranks, in order, for those of each cache's host."""
    from huggingface_hub import constants

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host = rank * len(caches) // ranks
    constants.HF_HUB_CACHE = caches[host]
    os.environ["HF_TOKEN"] = Path(caches[host]).name
    spec = {"dtype": "bfloat16", "zero3": {}, **keys}
    fetched = llmload.load({"model": model, "streaming": {"fetch": "spans"}, **spec})
    whole = llmload.load({"model": folder, **spec})
    notes = {step.plugin: step.notes for step in fetched.plan.steps if step.notes}
    return {
        "host": host,
        "loader": fetched.report.loader,
        "files": fetched.report.facts["streaming"]["files"],
        "notes": notes["streaming"],
        "equal": parts(fetched.model) == parts(whole.model),
    }


def parts(model: Any) -> dict[str, tuple[int, bytes]]:
    """Return this rank's part of each parameter."""
    found = {}
    for name, parameter in testing.parameters(model).items():
        part = held(parameter)
        if part is not None:
            data = part[0].detach().contiguous().view(-1).view(torch.uint8)
            found[name] = (part[1], data.numpy().tobytes())
    return found
