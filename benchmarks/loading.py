"""Plain loads against ``from_pretrained``, and what comes before a load."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .case import Case
from .folders import folder

TITLE = "Loading"

_GROWTH = ("0.1B", "0.5B", "1.1B", "3B")
_WIDTH = {"float32": 4, "bfloat16": 2}


def llmload_as(dtype: str) -> Callable[[Path], Any]:
    """Load through llmload at ``dtype``: plan, load, audit and report."""

    def run(folder: Path) -> Any:
        import llmload

        return llmload.load({"model": str(folder), "dtype": dtype})

    return run


def from_pretrained_as(dtype: str) -> Callable[[Path], Any]:
    """Load with transformers at ``dtype``."""

    def run(folder: Path) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        from llmload.hf import installed_transformers

        options = installed_transformers().dtype_option(getattr(torch, dtype))
        return AutoModelForCausalLM.from_pretrained(folder, **options)

    return run


def weights_mib(folder: Path) -> float:
    """Return the size of a folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20


def open_with_llmload(folder: Path) -> Any:
    """Read and validate names, shapes, dtypes and places of all tensors."""
    from llmload.checkpoint import Checkpoint

    return Checkpoint.open(folder)


def open_with_safetensors(folder: Path) -> Any:
    """Read names and shapes of all tensors."""
    from safetensors import safe_open

    shapes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    return shapes


def _cast(title: str, stored: str, final: str, memory: str) -> Case:
    return Case(
        title=title,
        sides={"llmload": llmload_as(final), "from_pretrained": from_pretrained_as(final)},
        target=f"0.95-1.05x the time, {memory}",
        final=lambda made: weights_mib(made) * _WIDTH[final] / _WIDTH[stored],
        checkpoint=partial(folder, dtype=stored),
        sizes=_GROWTH,
        stacks=("modern", "colossalai"),
    )


CASES = {
    "same-dtype": _cast("bfloat16 as it is stored", "bfloat16", "bfloat16", "never more memory"),
    "upcast": _cast(
        "bfloat16 to float32", "bfloat16", "float32", "peak at most 1.02x the final size"
    ),
    "downcast": _cast(
        "float32 to bfloat16", "float32", "bfloat16", "peak at most 1.02x the final size"
    ),
    "headers": Case(
        title="headers of a folder",
        sides={"llmload": open_with_llmload, "safetensors": open_with_safetensors},
        target="below 0.05 s",
        final=lambda made: 0.0,
        sizes=("1.1B",),
    ),
    "script": Case(
        title="import to loaded model",
        sides={
            "llmload": (
                "import llmload; llmload.load({{'model': {folder!r}, 'dtype': 'bfloat16'}})"
            ),
            "plain script": (
                "from transformers import AutoModelForCausalLM\n"
                "AutoModelForCausalLM.from_pretrained({folder!r}, dtype='bfloat16')"
            ),
        },
        target="never slower",
        final=weights_mib,
        sizes=("0.1B",),
    ),
    "import": Case(
        title="import alone",
        sides={
            "llmload": "import llmload",
            "the stack": "import torch, transformers, peft, accelerate, bitsandbytes, deepspeed",
        },
        target="below 0.05 s above Python's own start",
        final=lambda made: 0.0,
        sizes=("0.1B",),
    ),
}
