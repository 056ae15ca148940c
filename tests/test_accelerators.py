"""Weights on their way to an accelerator: on a pretended one everywhere, on a real one if there is.

The pretended one lasts as long as its process, so that its tests have one of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from once import once
from safetensors.torch import load_file
from stacks import needs_python_devices

import llmload
from llmload.checkpoint.staging import BUFFER, MOST_BUFFERS, Staging, pieces
from llmload.testing import run_on_ranks, save_checkpoint, tiny_model

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PRETENDED = Path(__file__).with_name("on_pretended_device.py")
NAMES = re.findall(r"^def (test_\w+)", PRETENDED.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What failed of each test on the pretended device."""

    def run() -> dict[str, list[str]]:
        report = tmp_path_factory.mktemp("pretended") / "report.xml"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        command = [sys.executable, "-m", "pytest", "-q", str(PRETENDED), f"--junitxml={report}"]
        done = subprocess.run(command, capture_output=True, text=True, env=inherited)
        assert report.exists(), done.stdout + done.stderr
        found: dict[str, list[str]] = {}
        for case in ET.parse(report).iter("testcase"):
            wrong = found.setdefault(str(case.get("name")).partition("[")[0], [])
            wrong += [str(fault.text) for fault in case if fault.tag != "system-out"]
        return found

    return once(tmp_path_factory, "accelerators", run)


@needs_python_devices
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_on_a_pretended_device(name: str, outcomes: dict[str, list[str]]) -> None:
    assert outcomes[name] == []


# --- on a real one ------------------------------------------------------------------------------

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 290 MiB, in more pieces than there are buffers."""
    sizes = {"vocab_size": 65536, "hidden_size": 1024, "intermediate_size": 4096}
    model = tiny_model(dtype=torch.bfloat16, **sizes)
    return save_checkpoint(model, tmp_path_factory.mktemp("large") / "llama")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().view(torch.uint8)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("reading", ["mapped", "ahead", "read"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_every_weight_arrives_as_a_cast_on_the_host_gives_it(
    dtype: str, reading: str, folder: Path
) -> None:
    spec = {"model": str(folder), "dtype": dtype, "device_map": "cuda:0"}
    model = llmload.load({**spec, "streaming": {"reading": reading}}).model
    held = load_file(folder / "model.safetensors")
    for name, value in model.state_dict().items():
        assert value.device == torch.device("cuda:0")
        assert torch.equal(bits(value), bits(held[name].to(getattr(torch, dtype)))), name


@pytest.mark.gpu
@on_a_gpu
def test_copies_are_in_the_order_of_the_stream_that_is_current(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    with torch.cuda.stream(torch.cuda.Stream()):
        spec = {"model": str(folder), "dtype": "bfloat16", "device_map": "cuda:0"}
        doubled = {n: v * 2 for n, v in llmload.load(spec).model.state_dict().items()}
        for name, value in doubled.items():
            assert torch.equal(bits(value), bits(held[name] * 2)), name


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("final", DTYPES)
def test_casts_on_the_way_keep_every_bit_of_every_value(
    stored: torch.dtype, final: torch.dtype
) -> None:
    patterns = torch.arange(2**16, dtype=torch.int32)
    if stored == torch.float32:  # what rounds up, down and to even; and NaN
        values = ((patterns << 16) + 0x8000 + patterns % 3 - 1).view(stored)
    else:
        values = patterns.to(torch.int16).view(stored)
    values = values.repeat(64)  # large enough to be sent through buffers, in several pieces
    out = torch.empty_like(values, dtype=final, device="cuda")
    with Staging() as staging:
        assert staging.serves(out)
        for sent, piece in pieces(out, values):
            staging.send(sent, stored, piece_writer(piece))
        staging.finish()
        assert torch.equal(bits(out), bits(values.to(final)))


def piece_writer(piece: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    return lambda memory: memory.copy_(piece)


@pytest.mark.gpu
@on_a_gpu
def test_the_device_holds_nothing_beside_the_weights_but_pieces(folder: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    spec = {"model": str(folder), "dtype": "float32", "device_map": "cuda:0"}
    result = llmload.load(spec, prove=False)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < result.report.parameter_bytes + MOST_BUFFERS * BUFFER


def partitions_of_one_rank(folder: Path) -> list[str]:
    """Return the parameters that are not on the device, or not what the file has."""
    zero3 = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    config = zero3 | {"train_micro_batch_size_per_gpu": 1}
    model = llmload.load({"model": str(folder), "zero3": {"config": config}}).model
    held = load_file(folder / "model.safetensors")
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ds_tensor.device.type != "cuda"
        or not torch.equal(bits(parameter.ds_tensor), bits(held[name].view(-1)))
    ]


@pytest.mark.gpu
@on_a_gpu
def test_zero3_reads_a_partition_straight_to_the_device(folder: Path) -> None:
    assert run_on_ranks(partitions_of_one_rank, folder, ranks=1, process_group=False) == [[]]


# --- what measures it ---------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_an_accelerator_the_benchmark_says_so_and_runs_nothing() -> None:
    command = [sys.executable, "-m", "benchmarks.accelerator"]
    root = PRETENDED.parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == (
        "There is no accelerator here: torch sees no CUDA device. Nothing was run.\n"
    )
