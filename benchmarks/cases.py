"""What is compared: each case has two sides that do the same work, and the target it is held to.

A side is a function of the checkpoint folder, run in its own process after its imports are done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import kbit

Side = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """One comparison."""

    title: str
    stored: str
    """Dtype of the checkpoint."""
    final: str | Callable[[Path], float]
    """Dtype of the loaded parameters, or what they take in MiB: what the run needs in memory."""
    ours: Side
    peer: Side
    peer_name: str
    target: str
    imports: tuple[str, ...] = ()
    """Modules that both sides need and import before the clock starts."""


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
    "kbit": Case(
        title="nf4 with double quantisation",
        stored="bfloat16",
        final=partial(kbit.final_mib, prepare=None),
        ours=partial(kbit.ours, prepare=None),
        peer=partial(kbit.theirs, prepare=None),
        peer_name="from_pretrained",
        target="at least 8x faster, stretch 15x",
        imports=kbit.IMPORTS,
    ),
    "qlora": Case(
        title="nf4, legacy preparation, LoRA",
        stored="bfloat16",
        final=partial(kbit.final_mib, prepare="legacy"),
        ours=partial(kbit.ours, prepare="legacy"),
        peer=partial(kbit.theirs, prepare="legacy"),
        peer_name="from_pretrained, prepare_model_for_kbit_training, get_peft_model",
        target="peak at most 1.05x the final size",
        imports=kbit.IMPORTS,
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
