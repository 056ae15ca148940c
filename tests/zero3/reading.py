"""Run on every rank: what a load read and kept, by its own count."""

from __future__ import annotations

from typing import Any

import llmload


def load(folder: str, dtype: str) -> dict[str, Any]:
    result = llmload.load({"model": folder, "dtype": dtype, "zero3": {}})
    facts = result.report.facts
    notes = {step.plugin: step.notes for step in result.plan.steps if step.notes}
    return {
        "files": facts["streaming"]["files"],
        "kept": facts["zero3"]["partition_bytes"] + sum(b.nbytes for b in result.model.buffers()),
        "partitions": facts["zero3"]["partition_bytes"],
        "note": notes["zero3"][-1],
        "reads": notes["streaming"][-1],
    }
