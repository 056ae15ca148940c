"""Files that somebody swaps while they are loaded: one file's bytes or the other's, or an error."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import llmload
from llmload.testing import tiny_checkpoint

SEED = 20
SWAPS = int(os.environ.get("LLMLOAD_TEST_SWAPS", "10"))
"""Loads that are raced, of each kind; more in ``nox -s long_trust``."""
WEIGHTS = "model.safetensors"


def replaced(folder: Path, other: Path) -> None:
    """Put another file in the place of the weights, as a download does that has ended."""
    shutil.copy(other / WEIGHTS, folder / "beside")
    (folder / "beside").replace(folder / WEIGHTS)


def cut_off(folder: Path, other: Path) -> None:
    """Cut the weights off where they are."""
    os.truncate(folder / WEIGHTS, 5000)


def removed(folder: Path, other: Path) -> None:
    """Remove the weights."""
    (folder / WEIGHTS).unlink()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints that differ in their values alone."""
    place = tmp_path_factory.mktemp("raced")
    return tiny_checkpoint(place / "one"), tiny_checkpoint(place / "other", seed=1)


@pytest.mark.refused_late
@pytest.mark.parametrize("swap", [replaced, cut_off, removed])
def test_a_load_that_is_raced_gives_one_file_whole_or_an_error(
    swap: Callable[[Path, Path], None],
    folders: tuple[Path, Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    one, other = folders
    spec = {"streaming": {"mapped": False}}
    whole = [
        llmload.load({"model": str(folder), **spec}).model.state_dict() for folder in (one, other)
    ]
    began = time.monotonic()
    llmload.load({"model": str(one), **spec})
    seconds = time.monotonic() - began
    moments, ends = random.Random(SEED), {"one": 0, "other": 0, "refused": 0}
    for number in range(SWAPS):
        folder = tmp_path / str(number)
        shutil.copytree(one, folder)
        racing = threading.Timer(moments.random() * seconds, swap, (folder, other))
        racing.start()
        try:
            found = llmload.load({"model": str(folder), **spec}).model.state_dict()
        except llmload.LlmloadError:
            ends["refused"] += 1
        else:
            same = [all(map(torch.equal, found.values(), known.values())) for known in whole]
            assert any(same), "the model is half of each file"
            ends["one" if same[0] else "other"] += 1
        finally:
            racing.join()
        shutil.rmtree(folder)
    record_property("figure", f"{SWAPS} raced loads: {ends}")
