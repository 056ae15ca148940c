"""Run on every rank: which pages of its own copy of a folder a load of its part has touched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from page_residency import evict, resident

import llmload


def load(place: str) -> dict[str, Any]:
    """Load ``model`` in the folder of this rank, with none of its files in memory.

    Pages are in the memory of a host, not of a rank: by copies of its own each rank is known.
    """
    os.chdir(Path(place, os.environ["RANK"]))
    files = sorted(Path("model").glob("*.safetensors"))
    evict(*files)
    before = {file.name: sorted(resident(file)) for file in files}
    result = llmload.load(
        {
            "model": "model",
            "dtype": "bfloat16",
            "zero3": {},
            "streaming": {"reading": "ahead"},
        }
    )
    after = {file.name: sorted(resident(file)) for file in files}
    return {"before": before, "after": after, "loader": result.report.loader}
