"""Run on every rank: how many bytes of each file a load read."""

from __future__ import annotations

from typing import Any

import llmload
from llmload import create_registry


def load(folder: str, block: list[str], **keys: Any) -> dict[str, Any]:
    spec = {"model": folder, "dtype": "bfloat16", "zero3": {}, **keys}
    result = llmload.load(spec, registry=create_registry(block=block, environ={}))
    name = "streaming" if result.report.loader == "streaming" else "transformers"
    return {"loader": result.report.loader, "files": result.report.facts[name]["files"]}
