"""What is compared: each case has two sides that do the same work, and the target it is held to.

A side is a function of the checkpoint folder, run in its own process after its imports are done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Side = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """One comparison."""

    title: str
    stored: str
    """Dtype of the checkpoint."""
    final: str
    """Dtype of the loaded parameters; what the run needs in memory."""
    ours: Side
    peer: Side
    peer_name: str
    target: str


def llmload_as(dtype: str) -> Side:
    """Load through llmload at ``dtype``: plan, load, audit and report."""

    def run(folder: Path) -> Any:
        import llmload

        return llmload.load({"model": str(folder), "dtype": dtype})

    return run


def from_pretrained_as(dtype: str) -> Side:
    """Load with transformers at ``dtype``."""

    def run(folder: Path) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        from llmload import compat

        options = compat.dtype_option(getattr(torch, dtype))
        return AutoModelForCausalLM.from_pretrained(folder, **options)

    return run


CASES = {
    "same-dtype": Case(
        title="bfloat16 as it is stored",
        stored="bfloat16",
        final="bfloat16",
        ours=llmload_as("bfloat16"),
        peer=from_pretrained_as("bfloat16"),
        peer_name="from_pretrained",
        target="0.95-1.05x the time, never more memory",
    ),
    "upcast": Case(
        title="bfloat16 to float32",
        stored="bfloat16",
        final="float32",
        ours=llmload_as("float32"),
        peer=from_pretrained_as("float32"),
        peer_name="from_pretrained",
        target="0.95-1.05x the time, peak at most 1.02x the final size",
    ),
    "downcast": Case(
        title="float32 to bfloat16",
        stored="float32",
        final="bfloat16",
        ours=llmload_as("bfloat16"),
        peer=from_pretrained_as("bfloat16"),
        peer_name="from_pretrained",
        target="0.95-1.05x the time, peak at most 1.02x the final size",
    ),
}

WHOLE = {
    "script": (
        "import llmload; llmload.load({{'model': {folder!r}, 'dtype': 'bfloat16'}})",
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained({folder!r}, dtype='bfloat16')",
    ),
}
"""Whole scripts, timed from start to exit: ours and the peer's."""
