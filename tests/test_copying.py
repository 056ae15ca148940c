"""Casts that other threads make: the same values, errors told, bounded, no thread left."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sameness import differences, from_pretrained
from transformers import AutoModelForCausalLM

import llmload
from llmload.checkpoint import TensorInfo, placer
from llmload.checkpoint.copying import Copies
from llmload.checkpoint.mapped import MappedCheckpoint
from llmload.checkpoint.placement import Plain, Source, Target
from llmload.checkpoint.proof import sha256
from llmload.testing import save_checkpoint, snapshot, tiny_model

LARGE = 2**20
"""Bytes that are worth a thread."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose embedding, head and one further matrix are copied by threads."""
    model = tiny_model(vocab_size=8192, intermediate_size=8192, dtype=torch.bfloat16)
    return save_checkpoint(model, tmp_path / "llama")


def placed_by(place: Any) -> llmload.Registry:
    class Placing(Plain):
        def place(self, target: Target, source: Source) -> torch.Tensor:
            return place(target, source)

    class Places:
        name = "places"

        @llmload.hookimpl
        def init_context(self, ctx: llmload.LoadContext) -> None:
            ctx.placement = Placing()

    return llmload.create_registry(plugins=[Places()])


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_threads_cast_is_what_transformers_gives(
    dtype: str, inference: bool, folder: Path
) -> None:
    with torch.inference_mode(inference):
        ours = llmload.load({"model": str(folder), "dtype": dtype}).model
        theirs = from_pretrained(AutoModelForCausalLM, folder, dtype=dtype)
        assert differences(ours, theirs) == []


def test_digests_are_of_the_finished_copies_and_in_the_order_of_placing(folder: Path) -> None:
    spec = {"model": str(folder), "dtype": "float32", "streaming": {"digests": True}}
    first, second = llmload.load(spec), llmload.load(spec)
    digests = first.report.facts["streaming"]["sha256"]
    held = load_file(folder / "model.safetensors")
    assert digests == {
        name: {"read": sha256(held[name]), "placed": sha256(placed)}
        for name, placed in first.model.state_dict().items()
    }
    assert list(digests) == list(second.report.facts["streaming"]["sha256"])


def test_a_cast_lets_go_of_the_pages_behind_it_piece_by_piece(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop = MappedCheckpoint.drop
    pieces: dict[str, list[int]] = {}

    def noting(
        files: MappedCheckpoint, info: TensorInfo, first: int = 0, nbytes: int | None = None
    ) -> None:
        if nbytes is not None:
            pieces.setdefault(info.name, []).append(nbytes)
        drop(files, info, first, nbytes)

    monkeypatch.setattr(MappedCheckpoint, "drop", noting)
    monkeypatch.setattr(placer, "_PIECE", 10_000)
    model = llmload.load({"model": str(folder), "dtype": "float32"}).model
    held = load_file(folder / "model.safetensors")
    assert {name: sum(sizes) for name, sizes in pieces.items()} == {
        name: value.nbytes for name, value in held.items()
    }
    assert max(max(sizes) for sizes in pieces.values()) == 10_000
    assert all(torch.equal(v, held[name].float()) for name, v in model.state_dict().items())


def test_memory_is_there_before_a_cast_fills_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds: list[tuple[int, int]] = []
    monkeypatch.setattr(placer, "populate", lambda out: bounds.append((out.data_ptr(), out.nbytes)))
    cast = llmload.load({"model": str(folder), "dtype": "float32"}).model
    assert sum(nbytes for _, nbytes in bounds) == sum(p.nbytes for p in cast.parameters())
    assert {p.data_ptr() for p in cast.parameters()} <= {start for start, _ in bounds}
    bounds.clear()
    llmload.load({"model": str(folder), "dtype": "bfloat16"})
    assert not bounds


def test_every_byte_is_counted_where_threads_copy(folder: Path) -> None:
    report = llmload.load({"model": str(folder), "dtype": "float32"}).report
    (file,) = report.facts["streaming"]["files"].values()
    assert file["bytes_read"] == file["tensor_bytes"]


def test_an_error_in_a_thread_is_the_cause_of_the_failure_and_nothing_is_left(
    folder: Path,
) -> None:
    def place(target: Target, source: Source) -> torch.Tensor:
        source.fill(torch.empty(2**20))  # of another shape
        return source.empty(target.dtype)

    before = snapshot()
    with pytest.raises(llmload.LoadFailedError, match="failed in load: RuntimeError: ") as caught:
        llmload.load({"model": str(folder), "dtype": "float32"}, registry=placed_by(place))
    assert isinstance(caught.value.__cause__, RuntimeError)
    del caught
    assert snapshot() == before


def test_an_interrupt_while_threads_copy_leaves_nothing(folder: Path) -> None:
    def place(target: Target, source: Source) -> torch.Tensor:
        if target.name == "model.norm.weight":  # the last
            raise KeyboardInterrupt
        return Plain().place(target, source)

    before = snapshot()
    with pytest.raises(KeyboardInterrupt):
        llmload.load({"model": str(folder), "dtype": "float32"}, registry=placed_by(place))
    assert snapshot() == before


def test_no_more_jobs_run_or_wait_than_twice_the_threads() -> None:
    lock, open_, most = threading.Lock(), [0], [0]

    def job() -> None:
        with lock:
            open_[0] -= 1

    with Copies() as copies:
        for _ in range(200):
            with lock:
                open_[0] += 1
                most[0] = max(most[0], open_[0])
            copies.add(job, LARGE)
        copies.finish()
        assert most[0] <= 2 * copies._threads + 1
    assert open_ == [0]


def test_small_jobs_are_done_at_once_and_start_no_thread() -> None:
    before, done = threading.enumerate(), []
    with Copies() as copies:
        copies.add(lambda: done.append(1), 100)
        assert done == [1]
        assert threading.enumerate() == before


def test_jobs_that_have_not_begun_are_dropped_when_something_fails() -> None:
    begun, gate = [], threading.Event()

    def job() -> None:
        begun.append(1)
        gate.wait()

    def fail_with_one_more_job_than_threads() -> None:
        with Copies() as copies:
            for _ in range(copies._threads + 1):
                copies.add(job, LARGE)
            threading.Timer(0.2, gate.set).start()
            raise ZeroDivisionError

    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError):
        fail_with_one_more_job_than_threads()
    assert len(begun) <= Copies()._threads
    assert {each for each in threading.enumerate() if "llmload" in each.name} <= before
