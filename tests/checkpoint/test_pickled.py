"""Pickles are refused unopened; where they are allowed, only tensors come out of them."""

from __future__ import annotations

import io
import os
import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from raw_files import entry, write

from llmload.checkpoint import Checkpoint
from llmload.checkpoint.mapped import MappedCheckpoint
from llmload.errors import CheckpointError

CONVERT = "Save it again as safetensors, on a machine that may open pickles."
REFUSED = (
    "the only weights here are a pickle, and opening a pickle can run code. Convert it to "
    "safetensors elsewhere, or set allow_pickle: true with torch >= 2.10."
)

needs_safe_torch = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10), reason="no pickle is opened here"
)

_events: list[str] | None = None


def _note(event: str, args: tuple[object, ...]) -> None:
    if _events is not None and (event == "pickle.find_class" or event.startswith("os.system")):
        _events.append(event)


sys.addaudithook(_note)


class Canary:
    """Leaves a file behind wherever it is unpickled without restriction."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def canaries(trace: Path) -> Iterator[bytes]:
    """The same payload as a bare pickle of every protocol, in torch's zip layout and its oldest."""
    payload = {"w": torch.zeros(2), "x": Canary(trace)}
    for protocol in range(6):
        yield pickle.dumps({"w": 1, "x": Canary(trace)}, protocol)
    for modern in (True, False):
        buffer = io.BytesIO()
        torch.save(payload, buffer, _use_new_zipfile_serialization=modern)
        yield buffer.getvalue()


NAMES = [
    "pytorch_model.bin",
    "model.safetensors",
    "adapter_model.bin",
    "pytorch_model.pt",
    "consolidated.00.pth",
    "model.ckpt",
    "weights.pkl",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_pickle_in_a_folder_is_opened_by_default(name: str, tmp_path: Path) -> None:
    global _events
    trace = tmp_path / "trace"
    for number, content in enumerate(canaries(trace)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(content)
        _events = seen = []
        with pytest.raises(CheckpointError):
            Checkpoint.open(folder)
        with pytest.raises(CheckpointError):
            Checkpoint.open(folder / name)
        _events = None
        assert seen == []
        assert not trace.exists()


@needs_safe_torch
def test_where_pickles_are_allowed_code_in_them_still_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for number, content in enumerate(canaries(trace)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(folder, allow_pickle=True)
        assert CONVERT in str(caught.value)
        assert not trace.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_a_folder_of_pickles_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert str(caught.value) == f"{tmp_path / name}: {REFUSED}"


def test_a_pickle_beside_safetensors_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"nonsense")
    write(tmp_path / "model.safetensors", {"w": entry("F32", [2], 0)}, 8)
    assert Checkpoint.open(tmp_path, allow_pickle=True).format == "safetensors"


def test_an_index_of_safetensors_cannot_name_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "x.bin"}}')
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path, allow_pickle=True)
    assert str(caught.value) == (
        f"{tmp_path}: the index names the shard 'x.bin', which is not a .safetensors file here"
    )


def test_an_old_torch_is_refused_before_the_pickle_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"nonsense")
    monkeypatch.setattr("llmload.checkpoint.pickled.version", lambda name: "2.5.1+cu124")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path, allow_pickle=True)
    assert str(caught.value) == (
        f"{path}: torch 2.5.1+cu124 cannot open pickles safely; torch >= 2.10 is needed. "
        "Convert the file to safetensors elsewhere, or upgrade torch."
    )


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    table = torch.randn(6, 4)
    return {
        "table": table,
        "tied": table,
        "rows": table[2:4],
        "half": torch.randn(3).half(),
        "brain": torch.nn.Parameter(torch.randn(5, 2).bfloat16()),
        "steps": torch.tensor(7),
        "empty": torch.empty(0, 3),
    }


@needs_safe_torch
def test_tensors_of_an_allowed_pickle_are_read_from_their_places_in_the_file(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    torch.save(state, tmp_path / "pytorch_model.bin")
    checkpoint = Checkpoint.open(tmp_path, allow_pickle=True)
    assert checkpoint.format == "pickle"
    assert checkpoint["tied"].start == checkpoint["table"].start
    assert checkpoint["rows"].start == checkpoint["table"].start + 2 * 4 * 4
    assert checkpoint["brain"].dtype == "BF16"
    with MappedCheckpoint(checkpoint) as files:
        for name, value in state.items():
            assert torch.equal(files.tensor(checkpoint[name]), value)


@needs_safe_torch
def test_sharded_pickles_are_read_through_their_index(tmp_path: Path) -> None:
    for name in "ab":
        torch.save({name: torch.ones(2)}, tmp_path / f"{name}.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        '{"weight_map": {"a": "a.bin", "b": "b.bin"}}'
    )
    assert Checkpoint.open(tmp_path, allow_pickle=True).names == ("a", "b")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder, allow_pickle=True)
    return str(caught.value).removeprefix(f"{folder / 'pytorch_model.bin'}: ")


@needs_safe_torch
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([torch.ones(2)], "the pickle is no mapping of names to plain tensors"),
        ({"model": {"w": torch.ones(2)}}, "the pickle is no mapping of names to plain tensors"),
        ({1: torch.ones(2)}, "the pickle is no mapping of names to plain tensors"),
        ({"w": torch.ones(3, 2).t()}, "tensor 'w' does not lie in one piece in the file"),
    ],
)
def test_a_pickle_of_anything_but_plain_tensors_is_refused(
    content: object, reason: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert refusal(tmp_path) == f"{reason}. {CONVERT}"


@needs_safe_torch
def test_the_oldest_layout_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert refusal(tmp_path) == f"the file is cut off or of torch's oldest layout. {CONVERT}"


@needs_safe_torch
def test_an_archive_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(2000)}, path)
    content = path.read_bytes()
    for cut in range(0, len(content), 501):
        path.write_bytes(content[:cut])
        assert refusal(tmp_path) == f"the file is cut off or of torch's oldest layout. {CONVERT}"


@needs_safe_torch
def test_a_compressed_archive_is_refused_because_its_bytes_are_not_the_tensors(
    tmp_path: Path,
) -> None:
    plain, path = tmp_path / "plain", tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.zeros(1000)}, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert refusal(tmp_path) == f"the archive is compressed or of another byte order. {CONVERT}"
