"""Trainers that ``accelerate launch`` starts with a DeepSpeed config: ``nox -s zero3_launched``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from zero3.farm import ENVIRONMENT, TESTS
from zero3.grouping import digests
from zero3.training import CONFIG

import llmload
from llmload import testing

KINDS = ["trainer", "sft"]
CASES = [f"{kind} {what}" for kind in KINDS for what in ("full", "adapter")]

pytestmark = [pytest.mark.timeout(1500), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launched")


@pytest.fixture(scope="module")
def found(place: Path) -> dict[str, list[dict[str, Any]]]:
    """What each way gave on each rank: the tools' own, and ours after the arguments are made."""
    folder = testing.tiny_llama(place, dtype=torch.bfloat16, pad=True)
    (place / "deepspeed.json").write_text(json.dumps(CONFIG))
    return {way: _launched(folder, place, way) for way in ("theirs", "after")}


def _launched(folder: Path, place: Path, way: str) -> list[dict[str, Any]]:
    own = place / way
    own.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--use_deepspeed", "--deepspeed_config_file", str(place / "deepspeed.json")]
    command += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", port]
    command += ["--mixed_precision", "bf16", "--dynamo_backend", "no"]
    script = [str(TESTS / "zero3" / "launched.py"), str(folder), str(own), way, *KINDS]
    env = os.environ | ENVIRONMENT | {"PYTHONPATH": str(TESTS)}
    done = subprocess.run([*command, *script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((own / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_a_model_of_ours_is_trained_to_the_losses_of_the_tools_own_path(
    found: dict[str, list[dict[str, Any]]], case: str
) -> None:
    for mine, other in zip(found["after"], found["theirs"], strict=True):
        assert mine[case]["losses"] == other[case]["losses"]
        assert len(mine[case]["losses"]) == 3
        assert mine[case]["partitioned"]
        assert mine[case]["digests"] == other[case]["digests"]


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_loads_unsharded_bit_by_bit(
    place: Path, found: dict[str, list[dict[str, Any]]], case: str
) -> None:
    saved = str(place / "after" / case.replace(" ", "-"))
    spec: dict[str, Any] = {"model": saved}
    if case.endswith("adapter"):
        spec = {"model": str(place / "llama"), "lora": {"adapter": saved, "adapter_dtype": "base"}}
    for rank in found["after"]:
        assert digests(llmload.load(spec).model) == rank[case]["digests"]
