"""On an accelerator: ``pytest -m gpu tests/test_kbit_gpu.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from quantised import load, plain, unlike

from llmload.testing import IDS, tiny_checkpoint

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


@pytest.mark.parametrize("section", [{"double_quant": True}, {"bits": 8}], ids=["4", "8"])
def test_adapters_train_on_the_device_as_with_transformers_and_peft(
    section: dict[str, Any], folder: Path
) -> None:
    config = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
    torch.manual_seed(5)
    ours = load(folder, section, lora=config).model
    torch.manual_seed(5)
    theirs = peft.get_peft_model(
        plain(folder, section), peft.LoraConfig(task_type="CAUSAL_LM", **config)
    )
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
        n for n, p in theirs.named_parameters() if p.requires_grad
    ]
    # Kernels may add up in another order from run to run.
    assert on_device(ours) == pytest.approx(on_device(theirs), rel=1e-3)


def on_device(model: Any) -> list[float]:
    """Train five steps, and return the losses."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = IDS.to("cuda")
    found = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_block_sizes_that_transformers_does_not_offer(block_size: int, folder: Path) -> None:
    """The audit quantises a block of each weight anew."""
    result = load(folder, {"block_size": block_size})
    facts = result.report.facts["kbit"]
    assert facts["proven_layers"] == facts["layers"] == 14
    assert "quantised_by" not in facts  # bitsandbytes' own kernel did it, on the device


def test_modules_on_the_host_stay_in_full_precision(folder: Path) -> None:
    split = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), 0)
    split |= {"model.layers.0": 0, "model.layers.1": "cpu"}
    model = load(folder, {"bits": 8, "fp32_cpu_offload": True}, device_map=split).model
    first, second = model.model.layers
    assert type(first.self_attn.q_proj) is Linear8bitLt
    assert type(second.self_attn.q_proj) is torch.nn.Linear
