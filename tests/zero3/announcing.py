"""Run on every rank: scripts that make their ``TrainingArguments`` before they load the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from zero3.grouping import digests

import llmload
from llmload.model.partitions import is_partitioned


def load(
    folder: str, place: str, zero: dict[str, Any], spec: dict[str, Any], *, order: str
) -> dict[str, Any]:
    """Load a spec before or after the arguments are made, and look at the model.

    :param zero: ``zero_optimization`` of the DeepSpeed config, beside the stage 3.
    """
    file = Path(place) / "ds.json"
    content = {
        "zero_optimization": {"stage": 3, **zero},
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
    }
    file.write_text(json.dumps(content))

    def announce() -> TrainingArguments:
        return TrainingArguments(
            output_dir=place, deepspeed=str(file), use_cpu=True, bf16=False, report_to=[]
        )

    arguments = announce() if order == "before" else None
    try:
        result = llmload.load({"model": folder, **spec})
    except llmload.RequestError as error:
        return {"refused": str(error)}
    arguments = arguments or announce()
    return {
        "partitioned": all(map(is_partitioned, result.model.parameters())),
        "loader": result.report.loader,
        "parameters": (result.plan.parameters, result.report.parameters),
        "digests": digests(result.model),
        "still set": arguments is not None and is_deepspeed_zero3_enabled(),
    }
