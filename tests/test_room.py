"""Memory that is not there: the plan says so first, and else the load does, with the numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from stacks import IS_MODERN

import llmload
from llmload.loading import room
from llmload.testing import tiny_checkpoint

MIB = 2**20
LIMITED = """
import json, resource, sys
import torch, transformers, peft
import llmload
spec, spare = json.loads(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
llmload.load({key: spec[key] for key in ("model", "dtype")})  # all is imported and warm
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + spare, used + spare))
try:
    llmload.load(spec)
except llmload.LlmloadError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two matrices of a vocabulary, 8 MiB each, and little else."""
    place = tmp_path_factory.mktemp("room") / "model"
    return tiny_checkpoint(place, hidden_size=64, vocab_size=32768, num_hidden_layers=1)


def said(folder: Path, spare: int, **keys: object) -> str:
    spec = {"model": str(folder), "dtype": "float32", **keys}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, json.dumps(spec), str(spare)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1] if done.stdout else ""


def test_embeddings_beyond_the_limit_of_the_process_are_refused_by_the_plan(folder: Path) -> None:
    found = said(folder, 200 * MIB, embeddings={"pad_to_multiple_of": 2**20})
    if IS_MODERN:
        assert found.startswith("PlanError the load takes ")
        assert "(by `ulimit -v`)" in found
    else:  # which reserves memory for each parameter before it puts it on the meta device
        assert found.startswith("PlanError model: ")
        assert "can't allocate memory" in found


def test_memory_that_runs_out_in_a_plugin_is_told_with_what_there_was(folder: Path) -> None:
    # On 4.51.3 the plan itself takes some twenty of them, and foresees what the load takes.
    spare = (60 if IS_MODERN else 100) * MIB
    found = said(folder, spare, embeddings={"pad_to_multiple_of": 2**17})
    assert found.startswith("LoadFailedError plugin '")
    assert "of memory are free (by `ulimit -v`). Give it more" in found


def test_memory_that_runs_out_while_hashing_is_told_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmload.loading import lock, pipeline

    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(lock, "held_to", exhausted)
    monkeypatch.setattr(pipeline.lock, "held_to", exhausted)
    with pytest.raises(
        llmload.LoadFailedError, match=r"the load of .* ran out of memory: "
    ) as told:
        llmload.load({"model": str(folder)})
    assert "of memory are free (by " in str(told.value)


def test_other_errors_are_not_taken_for_memory_that_ran_out() -> None:
    assert room.advice(RuntimeError("size mismatch")) == ""
    assert room.advice(OSError(2, "No such file or directory")) == ""
    assert "Give it more" in room.advice(
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
        )
    )
