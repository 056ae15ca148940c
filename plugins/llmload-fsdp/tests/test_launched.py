"""Started by ``accelerate launch``, trainers take a sharded model as they take transformers'."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmload.testing import tiny_checkpoint

pytest.importorskip("trl")

SCRIPT = Path(__file__).parent / "launched.py"
WAYS = {
    "several processes": ["--multi_gpu"],
    "FSDP2 announced": ["--use_fsdp", "--fsdp_version", "2"],
}
"""accelerate starts several processes where it is told of several GPUs; without any they meet by
gloo. On a CPU its Accelerator passes over FSDP, but the environment says it all the same."""


@pytest.fixture(scope="module", params=WAYS)
def found(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    place = tmp_path_factory.mktemp("launched")
    folder = tiny_checkpoint(place / "model", "llama")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    usual = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    usual += ["--dynamo_backend", "no", "--main_process_port", port]
    command = [*launcher, *WAYS[request.param], *usual, str(SCRIPT), str(folder), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((place / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("trainer", ["Trainer", "SFTTrainer"])
def test_a_script_under_accelerate_trains_to_the_losses_of_transformers_own(
    found: list[dict[str, Any]], trainer: str
) -> None:
    for rank in found:
        full, adapter = rank[f"{trainer} full"], rank[f"{trainer} adapter"]
        assert full["losses"] == rank[f"{trainer} theirs"]["losses"]
        assert len(full["losses"]) == 3
        assert full["losses"] == sorted(full["losses"], reverse=True)
        assert adapter["losses"][-1] < adapter["losses"][0]  # of two batches that differ
        assert full["unlike"] == adapter["unlike"] == []
