"""Loads onto the device of :mod:`pretended_device`; run by :mod:`test_accelerators`.

They show the right device, dtype, order and bytes, how much is pinned, how many copies are under
way while others are read, and what is left after an error. They show no times.
"""

from __future__ import annotations

import gc
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_device import BUS, DEVICE, Event, Stream, behind
from safetensors.torch import load_file

import llmload
from llmload.checkpoint import staging
from llmload.checkpoint.mapped import MappedCheckpoint
from llmload.checkpoint.placement import Part, Plain, Source, Target
from llmload.checkpoint.proof import sha256
from llmload.checkpoint.staging import BUFFER, MOST_BUFFERS, Staging
from llmload.errors import CheckpointError
from llmload.testing import save_checkpoint, tiny_model

MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 36 MiB: embedding and head take four buffers each, norms next to nothing."""
    model = tiny_model(
        vocab_size=32768, hidden_size=256, intermediate_size=1024, dtype=torch.bfloat16
    )
    return save_checkpoint(model, tmp_path_factory.mktemp("pretended") / "llama")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    BUS.reset()
    before = set(threading.enumerate())
    yield
    assert BUS.pinned == []
    assert {each for each in threading.enumerate() if "llmload" in each.name} <= before


def load(folder: Path, *plugins: object, **keys: Any) -> llmload.LoadResult:
    registry = llmload.create_registry(plugins)
    spec = {"model": str(folder), "device_map": str(DEVICE), **keys}
    return llmload.load(spec, registry=registry)


class Places:
    """A plugin that sets a placement."""

    name = "places"

    def __init__(self, placement: object) -> None:
        self._placement = placement

    @llmload.hookimpl
    def init_context(self, ctx: llmload.LoadContext) -> None:
        ctx.placement = self._placement


def unlike(model: torch.nn.Module, folder: Path, dtype: torch.dtype) -> list[str]:
    """Return the weights that are not on the device, or have other bits than a cast on the host."""
    held = load_file(folder / "model.safetensors")
    placed = model.state_dict()
    assert placed.keys() == held.keys()
    return [
        name
        for name, value in placed.items()
        if value.device != DEVICE or not same_bits(behind(value), held[name].to(dtype))
    ]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


# --- what arrives -------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", ["mapped", "ahead", "read"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_every_weight_is_there_as_a_cast_on_the_host_gives_it(
    dtype: str, reading: str, folder: Path
) -> None:
    result = load(folder, dtype=dtype, streaming={"reading": reading})
    assert unlike(result.model, folder, getattr(torch, dtype)) == []
    (file,) = result.report.facts["streaming"]["files"].values()
    assert file["bytes_read"] == file["tensor_bytes"]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("final", [torch.bfloat16, torch.float16, torch.float32])
def test_casts_keep_every_bit_of_every_value(stored: torch.dtype, final: torch.dtype) -> None:
    bits = torch.arange(2**16, dtype=torch.int32)
    # Of float32 those that bfloat16 rounds, up and down and to even, in each binade; and NaN.
    values = (
        ((bits << 16) + 0x8000 + bits % 3 - 1).view(stored)
        if stored == torch.float32
        else bits.to(torch.int16).view(stored)
    )
    out = torch.empty_like(values, dtype=final, device=DEVICE)
    with Staging() as sending:
        sending.send(out, stored, lambda memory: memory.copy_(values))
        sending.finish()
    assert same_bits(behind(out), values.to(final))


def test_bfloat16_goes_to_float32_on_the_device_and_other_casts_are_made_on_the_host(
    folder: Path,
) -> None:
    def carried(dtype: str) -> int:
        BUS.reset()
        load(folder, dtype=dtype)
        return BUS.nbytes

    assert carried("float32") == carried("float16") == carried("bfloat16")


def test_digests_are_of_what_has_arrived(folder: Path) -> None:
    report = load(folder, dtype="bfloat16", streaming={"digests": True}).report
    held = load_file(folder / "model.safetensors")
    assert report.facts["streaming"]["sha256"] == {
        name: {"read": sha256(value), "placed": sha256(value)} for name, value in held.items()
    }


def test_merged_experts_are_sent_piece_by_piece_of_the_file(tmp_path: Path) -> None:
    model = tiny_model("mixtral", hidden_size=256, intermediate_size=2048, dtype=torch.bfloat16)
    folder = save_checkpoint(model, tmp_path / "mixtral")
    placed = load(folder, dtype="float32").model.state_dict()
    assert BUS.copies
    for name, value in model.state_dict().items():
        assert same_bits(behind(placed[name]), value.float()), name


# --- in which order -----------------------------------------------------------------------------


def test_copies_are_begun_in_the_current_stream_from_all_threads(folder: Path) -> None:
    own, default = Stream(), torch.npu.current_stream()
    begun = default.begun
    with torch.npu.stream(own):
        model = load(folder, dtype="bfloat16").model
    assert own.begun >= BUS.copies > 20
    assert default.begun == begun
    assert unlike(model, folder, torch.bfloat16) == []


def test_who_works_with_a_weight_at_once_finds_its_values(folder: Path) -> None:
    class Doubled(Plain):
        def place(self, target: Target, source: Source) -> torch.Tensor:
            placed = super().place(target, source)
            waits = BUS.waits
            doubled = placed.mul_(2)
            assert BUS.waits == waits, "in the order of the stream, not by waiting"
            return doubled

    registry = llmload.create_registry([Places(Doubled())])
    spec = {"model": str(folder), "device_map": str(DEVICE), "dtype": "bfloat16"}
    result = llmload.load(spec, registry=registry, prove=False)  # else it would be found out
    for name, value in load_file(folder / "model.safetensors").items():
        assert same_bits(behind(result.model.state_dict()[name]), value * 2)


def test_parts_that_a_placement_fills_later_are_there_at_the_end(folder: Path) -> None:
    parts: dict[str, tuple[torch.Tensor, int, int]] = {}

    class Thirds(Plain):
        """As a placement that partitions does it."""

        def place(self, target: Target, source: Source) -> Part:  # type: ignore[override]
            size = source.shape.numel()
            start, stop = size // 3, 2 * size // 3
            part = torch.empty(stop - start, dtype=torch.float32, device=DEVICE)
            source.fill(part, start, stop)
            parts[target.name] = part, start, stop
            whole = torch.zeros(1, dtype=torch.float32, device=DEVICE).expand(source.shape)
            return Part(torch.nn.Parameter(whole), part)

        def finish(self, model: Any) -> None:
            found = load_file(folder / "model.safetensors")
            for name, (part, start, stop) in parts.items():
                assert same_bits(behind(part), found[name].view(-1)[start:stop].float()), name
            raise ZeroDivisionError  # a model of which a third was read is no model

    with pytest.raises(llmload.LoadFailedError, match="ZeroDivisionError"):
        load(folder, Places(Thirds()), dtype="float32")
    assert len(parts) == 21


# --- how much is pinned, and what is under way ----------------------------------------------------


def test_a_bus_that_is_slower_than_reading_has_every_buffer_and_no_more(folder: Path) -> None:
    BUS.reset(rate=0.5)
    load(folder, dtype="bfloat16")
    assert BUS.most_pinned == MOST_BUFFERS * BUFFER
    assert BUS.most_under_way > 1
    assert BUS.waits > 0


def test_no_more_is_pinned_than_is_needed_where_the_bus_is_faster(folder: Path) -> None:
    BUS.reset(rate=4)
    load(folder, dtype="bfloat16")
    assert BUS.most_pinned < MOST_BUFFERS * BUFFER
    assert BUS.waits == 0


def test_weights_are_read_while_others_are_under_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, under_way = MappedCheckpoint.read, []

    def noting(files: MappedCheckpoint, *arguments: Any) -> None:
        under_way.append(torch.npu.current_stream().under_way)
        read(files, *arguments)

    monkeypatch.setattr(MappedCheckpoint, "read", noting)
    BUS.reset(rate=0.5)
    load(folder, dtype="bfloat16")
    assert max(under_way) >= 2


def test_nothing_is_waited_for_before_the_end_where_there_are_buffers_enough(
    tmp_path: Path,
) -> None:
    model = tiny_model(vocab_size=4096, hidden_size=256, dtype=torch.bfloat16)
    folder = save_checkpoint(model, tmp_path / "small")
    seen = []

    class Seen(Plain):
        def place(self, target: Target, source: Source) -> torch.Tensor:
            placed = super().place(target, source)
            seen.append(BUS.waits)
            return placed

    load(folder, Places(Seen()), dtype="bfloat16")
    assert seen[:MOST_BUFFERS] == [0] * MOST_BUFFERS


# --- where it is off ----------------------------------------------------------------------------


def test_small_weights_alone_pin_nothing(tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_model(dtype=torch.bfloat16), tmp_path / "tiny")
    model = load(folder, dtype="float32").model
    assert (BUS.copies, BUS.most_pinned) == (0, 0)
    assert unlike(model, folder, torch.float32) == []


@pytest.mark.parametrize("some", [0, 3])
def test_where_no_more_memory_can_be_pinned_what_there_is_suffices(
    some: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, tried = staging.pinned, []

    def few(nbytes: int) -> torch.Tensor:
        tried.append(nbytes)
        if len(BUS.pinned) == some:
            raise RuntimeError("CUDA error: out of memory")
        return pinned(nbytes)

    monkeypatch.setattr(staging, "pinned", few)
    model = load(folder, dtype="float32").model
    assert BUS.most_pinned == some * BUFFER
    assert len(tried) == some + 1
    assert bool(BUS.copies) == bool(some)
    assert unlike(model, folder, torch.float32) == []


def test_a_device_without_events_gets_its_weights_one_by_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(type(torch.npu), "Event")
    model = load(folder, dtype="float32").model
    assert (BUS.copies, BUS.most_pinned) == (0, 0)
    assert unlike(model, folder, torch.float32) == []


# --- when something goes wrong ------------------------------------------------------------------
# `_nothing_is_left` looks for pinned memory and threads after each of these.


def forget(caught: pytest.ExceptionInfo[BaseException]) -> None:
    """Clear what the frames of an error hold, as whoever handles it does by letting go of it."""
    seen: list[BaseException | None] = [None]
    error: BaseException | None = caught.value
    while error not in seen:
        seen.append(error)
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    staging.unpin()


@pytest.mark.refused_late
def test_a_file_that_cannot_be_read_in_the_middle_ends_the_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, calls = MappedCheckpoint.read, []

    def failing(files: MappedCheckpoint, info: Any, *arguments: Any) -> None:
        calls.append(info)
        if len(calls) > 6:
            raise CheckpointError("the disk failed")
        read(files, info, *arguments)

    monkeypatch.setattr(MappedCheckpoint, "read", failing)
    with pytest.raises(CheckpointError, match="the disk failed") as caught:
        load(folder, dtype="bfloat16")
    forget(caught)
    assert 0 < BUS.copies <= 6
    stream = torch.npu.current_stream()
    assert stream.under_way == 0


def test_a_copy_that_fails_on_the_device_ends_the_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synchronize, calls = Event.synchronize, []

    def failing(event: Event) -> None:
        synchronize(event)
        calls.append(event)
        if len(calls) == 5:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Event, "synchronize", failing)
    with pytest.raises(llmload.LoadFailedError, match="illegal memory access") as caught:
        load(folder, dtype="bfloat16")
    forget(caught)


def test_an_interrupt_in_the_middle_leaves_nothing(folder: Path) -> None:
    class Interrupted(Plain):
        def place(self, target: Target, source: Source) -> torch.Tensor:
            if target.name == "model.norm.weight":  # the last
                raise KeyboardInterrupt
            return super().place(target, source)

    with pytest.raises(KeyboardInterrupt):
        load(folder, Places(Interrupted()), dtype="bfloat16")
    assert BUS.copies
