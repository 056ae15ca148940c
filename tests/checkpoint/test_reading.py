"""How bytes come into memory: chosen by where they lie, fetched ahead of use, and nothing else."""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from page_residency import evict, resident
from safetensors.torch import save_file
from sameness import differences, from_pretrained
from transformers import AutoConfig, AutoModelForCausalLM

import llmload
from llmload.checkpoint import Checkpoint, ahead, filesystem, libc, page_cache, reading
from llmload.checkpoint.ahead import ReadAhead
from llmload.checkpoint.placement import Plain
from llmload.checkpoint.ranges import ByteRange, ranges
from llmload.checkpoint.reading import Reading
from llmload.errors import CheckpointError
from llmload.testing import context_of, nothing_left_behind, tiny_checkpoint, tiny_llama

PAGE = mmap.PAGESIZE
WHOLE = 2**30
"""Room for all that is fetched here."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of 8 MiB that are not in memory, on a disk."""
    weights = {f"w{i}": torch.arange(2**20, dtype=torch.float32) + i for i in range(4)}
    for number, names in enumerate((["w0", "w1"], ["w2", "w3"]), 1):
        save_file({n: weights[n] for n in names}, tmp_path / f"model-{number}-of-2.safetensors")
    files = sorted(tmp_path.glob("*.safetensors"))
    index = {name: files[i // 2].name for i, name in enumerate(weights)}
    text = f'{{"metadata": {{}}, "weight_map": {index}}}'.replace("'", '"')
    (tmp_path / "model.safetensors.index.json").write_text(text)
    evict(*files)
    if resident(files[0]):
        pytest.skip("the temporary folder is on a file system that forgets no page")
    return tmp_path


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# --- which way ------------------------------------------------------------------------------------


def test_files_that_are_in_memory_are_mapped(folder: Path) -> None:
    for file in files_of(folder):
        file.read_bytes()
    assert Reading.choose(Checkpoint.open(folder), "auto") == Reading("mapped")


def test_files_that_are_not_in_memory_are_fetched_ahead(folder: Path) -> None:
    chosen = Reading.choose(Checkpoint.open(folder), "auto")
    kind = filesystem.kind(folder)
    assert (chosen.way, chosen.threads) == ("ahead", 4)
    assert chosen.why == f"not in memory yet, on {kind}"


def test_one_file_that_is_not_in_memory_is_enough(folder: Path) -> None:
    files_of(folder)[0].read_bytes()
    assert Reading.choose(Checkpoint.open(folder), "auto").way == "ahead"


def test_the_more_files_there_are_the_fewer_places_of_each_are_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in files_of(folder):
        file.read_bytes()
    looked: list[int] = []
    holds = page_cache.PageCache.holds

    def noting(cache: page_cache.PageCache, start: int, stop: int) -> bool:
        looked.append(start)
        return holds(cache, start, stop)

    monkeypatch.setattr(page_cache.PageCache, "holds", noting)
    for together, of_both in ((1024, 130), (8, 10), (1, 4)):
        monkeypatch.setattr(reading, "_PLACES", (64, together))
        looked.clear()
        assert Reading.choose(Checkpoint.open(folder), "auto").way == "mapped"
        assert len(looked) == of_both


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "fuse.sshfs", "fuse"])
def test_of_what_is_far_off_more_is_fetched_at_once(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No such file system is here, but for what ``benchmarks`` measures: only its name is given."""
    monkeypatch.setattr(filesystem, "kind", lambda path: kind)
    chosen = Reading.choose(Checkpoint.open(folder), "auto")
    assert (chosen.way, chosen.threads, chosen.why) == (
        "ahead",
        16,
        f"not in memory yet, on {kind}",
    )


def test_what_lies_in_memory_is_mapped_without_being_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "kind", lambda path: "tmpfs")
    assert Reading.choose(Checkpoint.open(folder), "auto").way == "mapped"


def test_small_files_are_mapped(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1000)}, tmp_path / "model.safetensors")
    evict(tmp_path / "model.safetensors")
    assert Reading.choose(Checkpoint.open(tmp_path), "auto").way == "mapped"


def test_what_the_kernel_does_not_tell_a_user_is_taken_for_not_in_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files that are another's, ``mincore`` says that every page is there."""
    for file in files_of(folder):
        file.read_bytes()
    monkeypatch.setattr(page_cache.os, "geteuid", lambda: os.stat(folder).st_uid + 1)
    monkeypatch.setattr(page_cache.os, "access", lambda *_: False)
    assert Reading.choose(Checkpoint.open(folder), "auto").way == "ahead"


def cannot_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file system here is without mmap, so the call is made to fail as theirs does."""

    def fail(descriptor: int, *_: Any) -> Any:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(libc, "mapped", fail)


def test_where_nothing_can_be_mapped_memory_of_ones_own_is_read_into(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cannot_map(monkeypatch)
    chosen = Reading.choose(Checkpoint.open(folder), "auto")
    kind = filesystem.kind(folder)
    assert (chosen.way, chosen.why) == ("read", f"files on {kind} cannot be mapped")


@pytest.mark.parametrize("way", ["mapped", "ahead", "read"])
def test_the_spec_decides_where_it_says_how(way: Any, folder: Path) -> None:
    chosen = Reading.choose(Checkpoint.open(folder), way)
    assert (chosen.way, chosen.why) == (way, "as the spec asks")


# --- ahead of use ---------------------------------------------------------------------------------


def fetching(
    checkpoint: Checkpoint, *wanted: ByteRange, room: int = WHOLE, piece: int = 2**20
) -> ReadAhead:
    return ReadAhead(checkpoint.files, wanted, Reading("ahead", 4, piece), room=room)


def test_what_was_asked_for_is_fetched_and_no_page_more(folder: Path) -> None:
    first, second = files_of(folder)
    wanted = [
        ByteRange(first, 3 * PAGE, 2**21 + 5),
        ByteRange(first, 2**22, 2**22 + 2 * PAGE),
        ByteRange(second, 2**20 + 7, 2**21 + 7),
    ]
    evict(first, second)
    checkpoint = Checkpoint.open(folder)
    before = {path: resident(path) for path in (first, second)}  # headers
    with fetching(checkpoint, *wanted) as reading:
        reading.finish()
    for path in (first, second):
        own = {
            number
            for file, start, stop in wanted
            if file == path
            for number in range(start // PAGE, -(-stop // PAGE))
        }
        assert resident(path) - before[path] == own - before[path]
    assert reading.fetched == sum(stop - start for _, start, stop in wanted)


def test_what_is_in_memory_is_not_read_again(folder: Path) -> None:
    (first, _), checkpoint = files_of(folder), Checkpoint.open(folder)
    size = first.read_bytes().__len__()
    with fetching(checkpoint, ByteRange(first, 0, size)) as reading:
        reading.finish()
    assert reading.fetched == 0


def test_no_more_is_fetched_than_there_is_room_for(folder: Path) -> None:
    (first, second), checkpoint = files_of(folder), Checkpoint.open(folder)
    wanted = [ByteRange(path, 0, path.stat().st_size) for path in (first, second)]
    with fetching(checkpoint, *wanted, room=2**21) as reading:
        reading.finish()
        # Threads that found room began a piece each.
        assert 2**21 <= reading.fetched <= 2**21 + 4 * 2**20


def test_what_was_used_makes_room(folder: Path) -> None:
    (first, _), checkpoint = files_of(folder), Checkpoint.open(folder)
    size = first.stat().st_size
    with fetching(checkpoint, ByteRange(first, 0, size), room=2**20) as reading:
        for start in range(0, size, 2**20):
            reading.need(first, start, min(start + 2**20, size))
            reading.used(first, start, min(start + 2**20, size))
        reading.finish()
    assert size - 2**20 <= reading.fetched <= size  # its header was read before
    assert len(resident(first)) == -(-size // PAGE)


def test_what_is_needed_now_is_fetched_where_there_is_no_room(folder: Path) -> None:
    (_, second), checkpoint = files_of(folder), Checkpoint.open(folder)
    end = second.stat().st_size
    with fetching(checkpoint, ByteRange(second, 0, end), room=0) as reading:
        reading.need(second, end - 10, end)
        assert end // PAGE in resident(second)
        reading.need(second, end - 10, end)  # again: it is there
        reading.need(files_of(folder)[0], 0, 10)  # nobody said that it would be read


def test_a_file_that_changed_is_told_of_by_whoever_waits(folder: Path) -> None:
    (first, _), checkpoint = files_of(folder), Checkpoint.open(folder)
    with first.open("ab") as file:
        file.write(b"more")
    with (
        fetching(checkpoint, ByteRange(first, 0, 2**21)) as reading,
        pytest.raises(CheckpointError, match="the file changed while it was being loaded"),
    ):
        reading.need(first, 0, 10)


def test_a_disk_that_fails_is_an_error_and_not_the_end_of_the_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of a mapping that cannot be read ends a process by SIGBUS; no disk here fails."""

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(ahead.os, "preadv", fail)
    (first, _), checkpoint = files_of(folder), Checkpoint.open(folder)
    with (
        fetching(checkpoint, ByteRange(first, 0, 2**21)) as reading,
        pytest.raises(CheckpointError) as caught,
    ):
        reading.finish()
    assert "the file cannot be read: Input/output error" in str(caught.value)


def test_nobody_waits_for_a_thread_that_ended_in_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise MemoryError

    monkeypatch.setattr(ahead._Opened, "fetch", fail)
    (first, _), checkpoint = files_of(folder), Checkpoint.open(folder)
    with (
        fetching(checkpoint, ByteRange(first, 0, 2**21)) as reading,
        pytest.raises(MemoryError),
    ):
        reading.need(first, 0, 10)


def test_no_thread_and_no_descriptor_is_left_whatever_happens(folder: Path) -> None:
    (first, _), checkpoint = files_of(folder), Checkpoint.open(folder)
    opened = len(os.listdir("/proc/self/fd"))
    with (
        pytest.raises(KeyboardInterrupt),
        fetching(checkpoint, ByteRange(first, 0, 2**23), room=0),
    ):
        raise KeyboardInterrupt
    assert not [t for t in threading.enumerate() if t.name == "llmload-ahead"]
    assert len(os.listdir("/proc/self/fd")) == opened


def test_few_of_many_files_are_open_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for number in range(40):
        save_file({f"w{number}": torch.zeros(9000)}, tmp_path / f"part-{number}.safetensors")
        files.append(Checkpoint.open(tmp_path / f"part-{number}.safetensors").files[0])
    most, opened, closed = [0], [0], ahead._Opened.close
    make = ahead._Opened.__init__

    def counted(self: Any, file: Any) -> None:
        make(self, file)
        opened[0] += 1
        most[0] = max(most[0], opened[0])

    def uncounted(self: Any) -> None:
        closed(self)
        opened[0] -= 1

    monkeypatch.setattr(ahead._Opened, "__init__", counted)
    monkeypatch.setattr(ahead._Opened, "close", uncounted)
    wanted = [ByteRange(file.path, 0, file.size) for file in files]
    with ReadAhead(files, wanted, Reading("ahead", 4, 2**20), room=WHOLE) as reading:
        reading.finish()
    assert opened[0] == 0
    assert 1 <= most[0] <= ahead._MOST_OPEN + 4


@pytest.mark.parametrize("seed", range(10))
def test_whatever_is_needed_in_whatever_order_comes(seed: int, folder: Path) -> None:
    """Three readers at a time, with little room, that use what they needed or keep it."""
    files, checkpoint, chance = files_of(folder), Checkpoint.open(folder), random.Random(seed)
    size = files[0].stat().st_size
    cuts = sorted(chance.sample(range(size), 8))
    spans = [ByteRange(f, a, b) for f in files for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
    asked = [
        (chance.choice(files), *sorted(chance.sample(range(size), 2)), chance.random() < 0.5)
        for _ in range(60)
    ]

    def read(one: tuple[Path, int, int, bool]) -> None:
        file, start, stop, is_used = one
        reading.need(file, start, stop)
        if is_used:
            reading.used(file, start, stop)

    room = chance.choice([0, 2**16, 2**22])
    piece = chance.choice([2**12, 2**16, 2**20])
    with (
        fetching(checkpoint, *spans, room=room, piece=piece) as reading,
        ThreadPoolExecutor(3) as readers,
    ):
        list(readers.map(read, asked))
        for span in spans:
            there = resident(span.file)
            for file, start, stop, _ in asked:
                first, last = max(start, span.start), min(stop, span.stop)
                if file == span.file and first < last:
                    assert there.issuperset(range(first // PAGE, -(-last // PAGE)))
        reading.finish()


# --- a model's ------------------------------------------------------------------------------------


class Half(Plain):
    """Reads one of two halves of every value, as two ranks do."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def extent(self, name: str, module: Any, attribute: str, shape: Any) -> tuple[int, int]:
        _, size = super().extent(name, module, attribute, shape)
        return self._rank * size // 2, (self._rank + 1) * size // 2


@pytest.fixture
def mixture(tmp_path: Path) -> tuple[Path, Any]:
    """A folder whose experts are merged into one parameter where transformers does that."""
    folder = tiny_checkpoint(tmp_path, "mixtral", dtype=torch.bfloat16)
    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return folder, context_of(blank, folder=folder)


def wanted(ctx: Any, placement: Any) -> list[ByteRange]:
    found = ranges(ctx.blank, ctx.accounting(ctx.blank), placement)
    assert found is not None
    return found


def test_a_whole_model_is_all_bytes_of_its_tensors(mixture: tuple[Path, Any]) -> None:
    folder, ctx = mixture
    found = wanted(ctx, Plain())
    assert sum(one.stop - one.start for one in found) == Checkpoint.open(folder).total_bytes
    assert found == sorted(found)


def test_ranks_that_keep_a_half_fetch_a_half_each_and_together_all(
    mixture: tuple[Path, Any],
) -> None:
    folder, ctx = mixture
    total = Checkpoint.open(folder).total_bytes
    halves = [wanted(ctx, Half(rank)) for rank in (0, 1)]
    for half in halves:
        assert sum(one.stop - one.start for one in half) == total // 2
    spans = sorted(one for half in halves for one in half)
    assert all(a.stop <= b.start for a, b in pairwise(spans) if a.file == b.file)


def test_a_placement_that_does_not_say_what_it_reads_has_nothing_fetched(
    mixture: tuple[Path, Any],
) -> None:
    class Silent:
        """Has no ``extent``, as placements of other packages have none."""

    _, ctx = mixture
    assert ranges(ctx.blank, ctx.accounting(ctx.blank), Silent()) is None  # type: ignore[arg-type]


WAYS = ("mapped", "ahead", "read")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_way_gives_what_from_pretrained_gives(
    way: str, model_type: str, dtype: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path, model_type, dtype=torch.bfloat16, shards=3)
    evict(*folder.glob("*.safetensors"))
    keys = {"dtype": dtype, "streaming": {"reading": way, "digests": True}}
    result = llmload.load({"model": str(folder), **keys})
    theirs = from_pretrained(AutoModelForCausalLM, folder, dtype=dtype)
    assert differences(result.model, theirs) == []
    facts = result.report.facts["streaming"]
    assert facts["reading"] == way
    for file in facts["files"].values():
        assert file["bytes_read"] == file["tensor_bytes"] > 0


def test_a_cold_load_says_how_it_reads_in_plan_and_report(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, hidden_size=256, intermediate_size=1024)
    weights = folder / "model.safetensors"
    evict(weights)
    if resident(weights):
        pytest.skip("the temporary folder is on a file system that forgets no page")
    result = llmload.load({"model": str(folder)})
    on = filesystem.kind(folder)
    total = Checkpoint.open(folder).total_bytes
    assert any(
        f"each tensor once, ahead of use, by 4 threads (not in memory yet, on {on})" in note
        for step in result.plan.steps
        for note in step.notes
    )
    facts = result.report.facts["streaming"]
    assert facts["reading"] == "ahead"
    assert 0.9 * total <= facts["fetched_ahead"] <= total  # the plan looked at the header
    assert facts["mapped"] == len(result.model.state_dict())
    again = llmload.load({"model": str(folder)}).report.facts["streaming"]
    assert (again["reading"], again["fetched_ahead"]) == ("mapped", 0)


def test_where_all_is_read_no_weight_stays_on_pages(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    result = llmload.load({"model": str(folder), "streaming": {"reading": "read"}})
    assert result.report.facts["streaming"]["mapped"] == 0
    first = next(iter(result.model.state_dict().values())).clone()
    path = folder / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))  # in place
    assert torch.equal(next(iter(result.model.state_dict().values())), first)


def test_a_load_that_fails_while_it_fetches_leaves_no_thread(tmp_path: Path) -> None:
    class Broken(Plain):
        def place(self, target: Any, source: Any) -> Any:
            raise RuntimeError("broken")

    class Plugin:
        name = "breaks"
        always_active = True

        @llmload.hookimpl
        def init_context(self, ctx: Any) -> None:
            ctx.placement = Broken()

    folder = tiny_llama(tmp_path)
    registry = llmload.create_registry(plugins=[Plugin()])
    spec = {"model": str(folder), "streaming": {"reading": "ahead"}}
    with nothing_left_behind(), pytest.raises(llmload.LoadFailedError, match="broken"):
        llmload.load(spec, registry=registry)
    assert not [t for t in threading.enumerate() if t.name.startswith("llmload")]


def test_files_that_cannot_be_mapped_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama(tmp_path, hidden_size=256, intermediate_size=1024)
    theirs = from_pretrained(AutoModelForCausalLM, folder)
    cannot_map(monkeypatch)
    result = llmload.load({"model": str(folder)})
    assert result.report.facts["streaming"]["reading"] == "read"
    assert differences(result.model, theirs) == []
