"""On an accelerator: ``pytest -m gpu tests/test_kbit_gpu.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantised import load, plain, unlike
from tiny import tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LLAMA = {"hidden_size": 64, "intermediate_size": 160}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("gpu") / "llama", dtype=torch.bfloat16, **LLAMA)


@pytest.mark.parametrize(
    "section",
    [{}, {"double_quant": True}, {"quant_type": "fp4"}, {"bits": 8}, {"prepare": "legacy"}],
    ids=str,
)
def test_a_model_is_quantised_on_the_device_as_transformers_does_it(
    section: dict[str, Any], folder: Path
) -> None:
    result = load(folder, section)
    theirs = plain(folder, section).requires_grad_(False)
    if section.get("prepare") == "legacy":
        theirs = theirs.float()
    assert unlike(result.model, theirs) == []
    assert {parameter.device.type for parameter in result.model.parameters()} == {"cuda"}


def test_each_process_takes_the_device_of_its_local_rank(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = torch.cuda.device_count() - 1
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    model = load(folder, {}).model
    assert {parameter.device.index for parameter in model.parameters()} == {rank}


def test_the_device_never_holds_the_full_precision_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    folder = tiny_checkpoint(tmp_path / "larger", dtype=torch.bfloat16, **sizes)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = load(folder, {"double_quant": True}, prove=False)
    largest = 2 * sizes["hidden_size"] * sizes["intermediate_size"]
    peak = torch.cuda.max_memory_allocated() - before
    # bitsandbytes' statistics and one weight in the model's dtype, beside what stays.
    assert peak < 1.25 * result.report.parameter_bytes + 2 * largest
