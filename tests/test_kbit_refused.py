"""The plugin kbit where transformers takes no bitsandbytes: 4.51.3 without an accelerator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from stacks import IS_MODERN

import llmload
from llmload.testing import tiny_checkpoint

pytestmark = pytest.mark.skipif(
    IS_MODERN or torch.cuda.is_available(), reason="bitsandbytes is taken here"
)


@pytest.mark.parametrize("section", [{}, {"bits": 8}])
def test_the_plan_says_why_and_what_instead(section: dict[str, int], tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "llama", hidden_size=64, intermediate_size=160)
    plan = llmload.plan({"model": str(folder), "dtype": "bfloat16", "kbit": section})
    assert [str(problem) for problem in plan.errors] == [
        f"kbit: transformers {transformers.__version__} refuses bitsandbytes here: it finds no"
        " accelerator, and does not take the CPU. Run on an accelerator, or use transformers 5,"
        " which takes bitsandbytes on a CPU."
    ]
