"""Digests of weights: samples tell a base model from what was tuned from it, a file's tells all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmload import testing
from llmload.checkpoint import Checkpoint
from llmload.checkpoint.digests import SAMPLE, of_file, of_samples
from llmload.errors import CheckpointError


def test_equal_weights_have_equal_samples_wherever_they_lie(tmp_path: Path) -> None:
    one = testing.tiny_llama(tmp_path / "a", shards=2)
    other = testing.tiny_llama(tmp_path / "b", shards=2)
    assert of_samples(Checkpoint.open(one)) == of_samples(Checkpoint.open(other))


def test_any_tensor_that_training_has_moved_changes_the_samples(tmp_path: Path) -> None:
    folder = testing.tiny_llama(tmp_path)
    before = of_samples(Checkpoint.open(folder))
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, value in weights.items():
        tuned = weights | {name: value + 1e-3}
        save_file(tuned, file, {"format": "pt"})
        assert of_samples(Checkpoint.open(folder)) != before, name


def test_samples_read_no_more_than_a_piece_of_each_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(testing.tiny_llama(tmp_path, hidden_size=64))
    pread, read = os.pread, []

    def counted(descriptor: int, length: int, start: int) -> bytes:
        read.append(length)
        return pread(descriptor, length, start)

    monkeypatch.setattr(os, "pread", counted)
    of_samples(checkpoint)
    assert len(read) == len(checkpoint.tensors)
    assert max(read) == SAMPLE


def test_empty_tensors_and_single_values_can_be_sampled(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.empty(0, 3), "b": torch.ones(())}, file)
    assert of_samples(Checkpoint.open(file)) == of_samples(Checkpoint.open(file))


def test_digest_of_a_file_is_that_of_all_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(5 * 2**20))
    assert of_file(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(CheckpointError, match="the file is missing"):
        of_file(tmp_path / "other")
