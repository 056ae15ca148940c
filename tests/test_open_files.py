"""Checkpoints of more files than a process may have open."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llmload
from llmload import testing

LAYERS = 24
"""Makes as many shards as tensors: nine in each layer, and three beside."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    return testing.tiny_llama(root, shards=10_000, num_hidden_layers=LAYERS)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are counted in /proc")
def test_a_loaded_model_keeps_no_file_open(folder: Path) -> None:
    assert len(list(folder.glob("*.safetensors"))) == 9 * LAYERS + 3
    llmload.load({"model": str(folder)})  # imports may open what stays
    gc.collect()
    before = descriptors()
    models = [llmload.load({"model": str(folder)}).model for _ in range(2)]
    assert descriptors() == before
    assert sum(p.numel() for p in models[0].parameters()) > 0


SCRIPT = """
import resource, sys
import llmload
resource.setrlimit(resource.RLIMIT_NOFILE, (128, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
spec = {"model": sys.argv[1]}
members = {name: spec | {"trainable": name == "policy"} for name in ("policy", "ref", "rm", "v")}
group = llmload.load_group({"models": members})
print(sum(p.numel() for name in group for p in group[name].model.parameters()))
"""


def test_a_group_of_four_loads_219_shards_with_128_descriptors(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0
