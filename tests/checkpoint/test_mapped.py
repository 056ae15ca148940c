"""Mapped tensors: the file's own pages, never written back, dropped on demand, never stale."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from raw_files import entry, write
from safetensors.torch import save_file

from llmload.checkpoint import Checkpoint, libc
from llmload.checkpoint.dtypes import safetensors_dtype, torch_dtype
from llmload.checkpoint.header import DTYPE_BITS
from llmload.checkpoint.mapped import MappedCheckpoint
from llmload.errors import CheckpointError

DTYPES = [dtype for name in DTYPE_BITS if (dtype := torch_dtype(name)) is not None]


def resident_file_bytes() -> int:
    """Bytes of mapped files in this process's memory."""
    status = Path("/proc/self/status").read_text()
    return (
        int(next(line for line in status.splitlines() if line.startswith("RssFile")).split()[1])
        * 1024
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_out_as_it_went_in(dtype: torch.dtype, tmp_path: Path) -> None:
    raw = torch.arange(48, dtype=torch.uint8) % 2
    tensor = raw.view(torch.bool if dtype == torch.bool else dtype).reshape(2, -1)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint["w"].dtype == safetensors_dtype(dtype)
    with MappedCheckpoint(checkpoint) as files:
        mapped = files.tensor(checkpoint["w"])
    assert mapped.dtype == dtype
    assert mapped.shape == tensor.shape
    assert torch.equal(mapped.view(torch.uint8), tensor.view(torch.uint8))


def test_a_dtype_that_torch_lacks_is_refused_by_name(tmp_path: Path) -> None:
    path = write(
        tmp_path / "model.safetensors",
        {"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}},
        2,
    )
    checkpoint = Checkpoint.open(tmp_path)
    with MappedCheckpoint(checkpoint) as files, pytest.raises(CheckpointError) as caught:
        files.tensor(checkpoint["w"])
    assert str(caught.value) == f"{path}: tensor 'w' has dtype F4, which torch lacks"


def test_scalars_and_empty_tensors_have_their_shapes(tmp_path: Path) -> None:
    write(
        tmp_path / "model.safetensors",
        {"scalar": entry("I64", [], 0), "empty": entry("F32", [0, 3], 8)},
        (5).to_bytes(8, "little"),
    )
    checkpoint = Checkpoint.open(tmp_path)
    with MappedCheckpoint(checkpoint) as files:
        assert files.tensor(checkpoint["scalar"]).item() == 5
        assert files.tensor(checkpoint["empty"]).shape == (0, 3)


def test_a_tensor_lies_on_the_files_pages_and_outlives_the_reader(tmp_path: Path) -> None:
    save_file({"v": torch.ones(3), "w": torch.arange(4.0)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with MappedCheckpoint(checkpoint) as files:
        tensor = files.tensor(checkpoint["w"])
        assert tensor.data_ptr() == files.address(checkpoint["w"])
        assert tensor.data_ptr() == files.tensor(checkpoint["w"]).data_ptr()
    assert tensor.tolist() == [0, 1, 2, 3]


def test_writing_to_a_tensor_changes_neither_the_file_nor_another_load(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(5000)}, path)
    before = path.read_bytes()
    checkpoint = Checkpoint.open(tmp_path)
    with MappedCheckpoint(checkpoint) as one, MappedCheckpoint(checkpoint) as two:
        first, second = one.tensor(checkpoint["w"]), two.tensor(checkpoint["w"])
    first.add_(1)
    assert first.sum() == 5000
    assert second.sum() == 0
    assert path.read_bytes() == before


def test_a_tensor_off_its_natural_boundary_is_read_all_the_same(tmp_path: Path) -> None:
    write(
        tmp_path / "model.safetensors",
        {"odd": entry("U8", [1], 0), "w": entry("I64", [2], 1)},
        b"\1" + (3).to_bytes(8, "little") + (4).to_bytes(8, "little"),
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert any(tensor.start % 8 for tensor in checkpoint.tensors.values() if tensor.name == "w")
    with MappedCheckpoint(checkpoint) as files:
        assert files.tensor(checkpoint["w"]).tolist() == [3, 4]


def test_dropped_pages_leave_memory_and_neighbours_keep_their_values(tmp_path: Path) -> None:
    size = 4 << 20
    save_file(
        {name: torch.full((size,), i) for i, name in enumerate("abc")}, tmp_path / "x.safetensors"
    )
    checkpoint = Checkpoint.open(tmp_path / "x.safetensors")
    with MappedCheckpoint(checkpoint) as files:
        a, b, c = (files.tensor(checkpoint[name]) for name in "abc")
        before = resident_file_bytes()
        assert b.sum() == size
        assert resident_file_bytes() - before > 0.9 * b.nbytes
        files.drop(checkpoint["b"])
        assert resident_file_bytes() - before < 0.05 * b.nbytes
        assert (a[-1], b[0], b[-1], c[0]) == (0, 1, 1, 2)


def test_bytes_are_counted_by_file_as_they_are_asked_for(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(10)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with MappedCheckpoint(checkpoint) as files:
        files.tensor(checkpoint["w"])
        assert list(files.bytes_read.values()) == [0]
        files.count(checkpoint["w"], 40)
        files.count(checkpoint["w"], 8)
        assert files.bytes_read == {checkpoint.files[0].path: 48}


CHANGED = (
    "the file changed while it was being loaded. Load again when nothing writes to the folder."
)


def replace(path: Path) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(path.read_bytes())
    new.replace(path)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize(
    "change", [replace, overwrite, lambda path: os.truncate(path, 200)], ids=["new", "edit", "cut"]
)
def test_a_file_that_changed_since_its_header_was_checked_is_not_read(
    change, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(5000)}, path)
    checkpoint = Checkpoint.open(tmp_path)
    change(path)
    with MappedCheckpoint(checkpoint) as files, pytest.raises(CheckpointError) as caught:
        files.tensor(checkpoint["w"])
    assert str(caught.value) == f"{path}: {CHANGED}"


@pytest.mark.parametrize(
    "change", [overwrite, lambda path: os.truncate(path, 200)], ids=["edit", "cut"]
)
def test_a_file_that_changes_while_it_is_read_is_not_read_on(change, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"v": torch.zeros(5000), "w": torch.zeros(5000)}, path)
    checkpoint = Checkpoint.open(tmp_path)
    with MappedCheckpoint(checkpoint) as files:
        files.tensor(checkpoint["v"])
        change(path)
        for act in (lambda: files.tensor(checkpoint["w"]), files.check):
            with pytest.raises(CheckpointError) as caught:
                act()
            assert str(caught.value) == f"{path}: {CHANGED}"


def test_a_file_replaced_while_it_is_read_stays_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(5000)}, path)
    checkpoint = Checkpoint.open(tmp_path)
    with MappedCheckpoint(checkpoint) as files:
        tensor = files.tensor(checkpoint["w"])
        save_file({"w": torch.ones(5000)}, tmp_path / "new")
        (tmp_path / "new").replace(path)
        assert files.tensor(checkpoint["w"]).sum() == 0
        files.check()
    assert tensor.sum() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="overcommit is Linux's")
def test_a_file_larger_than_memory_can_be_mapped(tmp_path: Path) -> None:
    size = 1 << 42
    path = write(tmp_path / "model.safetensors", {"w": entry("U8", [size], 0)}, 0)
    os.truncate(path, path.stat().st_size + size)
    checkpoint = Checkpoint.open(tmp_path)
    with MappedCheckpoint(checkpoint) as files:
        assert files.tensor(checkpoint["w"])[-1] == 0


def test_all_file_descriptors_are_closed_again(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(5)}, tmp_path / "model.safetensors")
    code = f"""
import os
from llmload.checkpoint import Checkpoint
from llmload.checkpoint.mapped import MappedCheckpoint
checkpoint = Checkpoint.open({str(tmp_path)!r})
import torch
before = len(os.listdir("/proc/self/fd"))
with MappedCheckpoint(checkpoint) as files:
    tensor = files.tensor(checkpoint["w"]).clone()
print(len(os.listdir("/proc/self/fd")) - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "0", result.stderr


def test_bytes_are_read_into_memory_without_mapping_them(tmp_path: Path) -> None:
    big = torch.arange(2**22, dtype=torch.int64)
    save_file({"a": torch.zeros(3), "w": big}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    part = torch.empty(2**20, dtype=torch.int64)
    before = resident_file_bytes()
    with MappedCheckpoint(checkpoint) as files:
        files.read(checkpoint["w"], 8 * 2**21, part)
        assert resident_file_bytes() - before < 2**20
    assert torch.equal(part, big[2**21 : 2**21 + 2**20])


def test_reading_a_file_that_ends_too_early_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(100)}, path)
    checkpoint = Checkpoint.open(tmp_path)
    part = torch.empty(100)
    with MappedCheckpoint(checkpoint) as files:
        files.tensor(checkpoint["w"])
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(CheckpointError, match="the file changed while it was being loaded"):
            files.read(checkpoint["w"], 0, part)


def test_part_keeps_its_own_pages_and_no_descriptor(tmp_path: Path) -> None:
    big = torch.arange(2**21, dtype=torch.int64)
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3), "w": big}, path)
    checkpoint = Checkpoint.open(tmp_path)
    before, opened = resident_file_bytes(), len(os.listdir("/proc/self/fd"))
    with MappedCheckpoint(checkpoint) as files:
        parts = [files.part(checkpoint["w"], 8 * i * 2**20, 8 * 2**20) for i in range(2)]
    parts = [part.view(torch.int64) for part in parts if part is not None]
    assert len(os.listdir("/proc/self/fd")) == opened
    assert torch.equal(torch.cat(parts), big)
    assert resident_file_bytes() - before >= 16 * 2**20
    parts[0].add_(1)  # copy on write
    parts.pop(1)
    assert resident_file_bytes() - before < 2**21
    assert torch.equal(parts[0], big[: 2**20] + 1)
    with MappedCheckpoint(checkpoint) as files:
        assert torch.equal(files.tensor(checkpoint["w"]), big)


def test_there_is_no_part_where_the_process_may_map_no_more(tmp_path: Path) -> None:
    big = torch.arange(2**23, dtype=torch.int64)
    save_file({"w": big}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with MappedCheckpoint(checkpoint) as files:
        files.tensor(checkpoint["w"])
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + big.nbytes * 3 // 2, hard))
        try:
            parts = [files.part(checkpoint["w"], 0, big.nbytes) for _ in range(2)]
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert [part is None for part in parts] == [False, True]


def test_part_of_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(100)}, path)
    checkpoint = Checkpoint.open(tmp_path)
    with MappedCheckpoint(checkpoint) as files:
        files.tensor(checkpoint["w"])
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(CheckpointError, match="the file changed while it was being loaded"):
            files.part(checkpoint["w"], 0, 8)


def test_a_file_system_that_cannot_map_is_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file system here is without mmap, so the call is made to fail as theirs does."""
    weights = {"a": torch.arange(5000.0), "b": torch.arange(7, dtype=torch.int16)}
    save_file(weights, tmp_path / "model.safetensors")
    map_memory = libc.mapped

    def cannot_map(descriptor: int, *args: Any) -> Any:
        if descriptor >= 0:
            raise OSError(errno.ENODEV, "No such device")
        return map_memory(descriptor, *args)

    monkeypatch.setattr(libc, "mapped", cannot_map)
    checkpoint = Checkpoint.open(tmp_path)
    with MappedCheckpoint(checkpoint) as files:
        found = {name: files.tensor(checkpoint[name]) for name in weights}
        files.drop(checkpoint["a"])
        assert files.part(checkpoint["a"], 400, 8) is None
        own = torch.empty(2)
        files.read(checkpoint["a"], 400, own)
        assert own.tolist() == [100, 101]
        unread = files.unread(checkpoint["b"])
        files.ask(checkpoint["b"], unread)
        assert torch.equal(unread, weights["b"])
    for name, tensor in found.items():
        assert torch.equal(tensor, weights[name])
