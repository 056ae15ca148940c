"""A safetensors header is read as strictly as by the reference reader, and more strictly."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from raw_files import ITEM_BYTES, entry, overwrite, write
from safetensors import SafetensorError, safe_open

from llmload.checkpoint import Checkpoint
from llmload.errors import CheckpointError

ROUNDS = int(os.environ.get("LLMLOAD_FUZZ_ROUNDS", "10000"))
AGAIN = "Download or save the file again."


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


def test_a_header_gives_names_dtypes_shapes_and_places_in_file_order(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry("F32", [2, 3], 4),
        "a": entry("F16", [2], 0),
        "scalar": entry("I64", [], 28),
        "empty": entry("F32", [0, 7], 36),
    }
    path = write(tmp_path / "model.safetensors", header, 36)
    checkpoint = Checkpoint.open(path)
    start = path.stat().st_size - 36
    assert checkpoint.names == ("a", "b", "scalar", "empty")
    assert [
        (t.dtype, t.shape, t.start - start, t.stop - start) for t in checkpoint.tensors.values()
    ] == [
        ("F16", (2,), 0, 4),
        ("F32", (2, 3), 4, 28),
        ("I64", (), 28, 36),
        ("F32", (0, 7), 36, 36),
    ]
    assert checkpoint.total_bytes == 36
    assert checkpoint.files[0].size == path.stat().st_size
    assert checkpoint.files[0].metadata == {"format": "pt"}
    assert checkpoint["b"].numel == 6
    assert "b" in checkpoint
    assert "c" not in checkpoint
    assert len(checkpoint) == 4


W = entry("F32", [2], 0)
WRONG_HEADERS: dict[str, tuple[Any, int, str]] = {
    "no tensor": ({}, 0, f"the header lists no tensor. {AGAIN}"),
    "leading blank": (
        " " + json.dumps({"w": W}),
        8,
        f"the header does not begin with '{{'. {AGAIN}",
    ),
    "not JSON": (
        "{nothing}",
        8,
        "the header is unreadable: not JSON at character 1: Expecting property name enclosed in "
        f"double quotes. {AGAIN}",
    ),
    "two values": (
        '{"w":1} {"w":2}',
        8,
        f"the header is unreadable: not JSON at character 8: Extra data. {AGAIN}",
    ),
    "not UTF-8": (b'{"\xff":1}', 8, f"the header is unreadable: byte 2 is not UTF-8. {AGAIN}"),
    "name twice": (
        f'{{"w":{json.dumps(W)},"w":{json.dumps(entry("I32", [2], 0))}}}',
        8,
        f"the header is unreadable: key 'w' appears twice. {AGAIN}",
    ),
    "field twice": (
        '{"w":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}',
        8,
        f"the header is unreadable: key 'dtype' appears twice. {AGAIN}",
    ),
    "metadata twice": (
        f'{{"__metadata__":{{}},"__metadata__":{{}},"w":{json.dumps(W)}}}',
        8,
        f"the header is unreadable: key '__metadata__' appears twice. {AGAIN}",
    ),
    "metadata of numbers": (
        {"__metadata__": {"a": 1}, "w": W},
        8,
        f"the header's __metadata__ is not a mapping of strings to strings. {AGAIN}",
    ),
    "unknown field": (
        {"w": W | {"scale": 1}},
        8,
        f"tensor 'w' does not have exactly dtype, shape and data_offsets. {AGAIN}",
    ),
    "missing field": (
        {"w": {"dtype": "F32", "shape": [2]}},
        8,
        f"tensor 'w' does not have exactly dtype, shape and data_offsets. {AGAIN}",
    ),
    "entry no object": (
        {"w": [1, 2]},
        8,
        f"tensor 'w' does not have exactly dtype, shape and data_offsets. {AGAIN}",
    ),
    "unknown dtype": (
        {"w": W | {"dtype": "F33"}},
        8,
        f"tensor 'w' has the unknown dtype 'F33'. {AGAIN}",
    ),
    "negative size": (
        '{"w":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}',
        8,
        f"the header is unreadable: -2 is no natural number below 2**64. {AGAIN}",
    ),
    "size as float": (
        {"w": W | {"shape": [2.0]}},
        8,
        f"tensor 'w' has the impossible shape [2.0]. {AGAIN}",
    ),
    "size as truth": (
        {"w": W | {"shape": [True, 2]}},
        8,
        f"tensor 'w' has the impossible shape [True, 2]. {AGAIN}",
    ),
    "NaN": (
        '{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
        8,
        f"the header is unreadable: NaN is not JSON. {AGAIN}",
    ),
    "huge number": (
        '{"w":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,8]}}',
        8,
        f"the header is unreadable: {'9' * 24} is no natural number below 2**64. {AGAIN}",
    ),
    "overflowing shape": (
        {"w": W | {"shape": [2**40, 2**40]}},
        8,
        f"tensor 'w' has the impossible shape [1099511627776, 1099511627776]. {AGAIN}",
    ),
    "offsets reversed": (
        {"w": W | {"data_offsets": [8, 0]}},
        8,
        f"tensor 'w' has the impossible data_offsets [8, 0]. {AGAIN}",
    ),
    "three offsets": (
        {"w": W | {"data_offsets": [0, 8, 8]}},
        8,
        f"tensor 'w' has the impossible data_offsets [0, 8, 8]. {AGAIN}",
    ),
    "shape and span disagree": (
        {"w": W | {"shape": [3]}},
        8,
        "tensor 'w' of dtype F32 and shape [3] needs 12 bytes, but its data_offsets span 8. "
        f"{AGAIN}",
    ),
    "half a byte": (
        {"w": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}},
        2,
        "tensor 'w' of dtype F4 and shape [3] needs 1.5 bytes, but its data_offsets span 2. "
        f"{AGAIN}",
    ),
    "hole at the start": (
        {"w": entry("F32", [2], 4)},
        12,
        f"tensor 'w' follows a hole. {AGAIN}",
    ),
    "hole": (
        {"v": W, "w": entry("F32", [2], 12)},
        20,
        f"tensor 'w' follows a hole. {AGAIN}",
    ),
    "overlap": (
        {"v": W, "w": entry("F32", [2], 4)},
        12,
        f"tensor 'w' overlaps the one before it. {AGAIN}",
    ),
    "same bytes twice": (
        {"v": W, "w": W},
        8,
        f"tensor 'w' overlaps the one before it. {AGAIN}",
    ),
    "nested without end": (
        '{"w":' + "[" * 100_000 + "]" * 100_000 + "}",
        8,
        f"the header is unreadable: nested too deeply. {AGAIN}",
    ),
}


@pytest.mark.parametrize("case", WRONG_HEADERS)
def test_a_wrong_header_is_refused_in_words(case: str, tmp_path: Path) -> None:
    header, data, expected = WRONG_HEADERS[case]
    assert refusal(write(tmp_path / "model.safetensors", header, data)) == expected


@pytest.mark.parametrize(
    "name", ["", "a\0b", "../w", "a/../b", "a\\..\\b", "/etc/passwd", "a\nb", "\u202ew", "\ud800"]
)
def test_a_tensor_name_that_no_module_can_have_is_refused(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {name: W}, 8)
    assert refusal(path) == f"the tensor name {name!r} is not allowed. {AGAIN}"


def test_bytes_missing_at_the_end_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {"w": W}, 5)
    size = path.stat().st_size
    assert refusal(path) == f"the file is cut off: expected {size + 3} bytes, found {size}. {AGAIN}"


def test_bytes_after_the_end_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {"w": W}, 11)
    size = path.stat().st_size
    assert (
        refusal(path) == f"the file is too long: expected {size - 3} bytes, found {size}. {AGAIN}"
    )


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((1000).to_bytes(8, "little") + b"{}")
    assert refusal(path) == (
        f"the header claims 1000 bytes, but the file is cut off after 10 bytes. {AGAIN}"
    )


@pytest.mark.parametrize("length", [25_000_001, 2**32, 2**64 - 1])
def test_a_header_longer_than_allowed_is_refused_unread(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    assert refusal(path) == (
        f"the header claims {length} bytes, more than the 25000000 allowed. {AGAIN}"
    )


@pytest.mark.parametrize("size", [0, 1, 9])
def test_a_file_too_short_for_a_header_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(size))
    assert refusal(path) == (
        f"the file has {size} bytes, too few for a safetensors header. {AGAIN}"
    )


def test_a_git_lfs_pointer_is_told_from_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert refusal(path) == (
        "a Git LFS pointer lies where the weights should be. "
        "Fetch the weights first, for example with git lfs pull."
    )


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02", b"\x80\x05"])
def test_a_pickle_under_another_name_is_told_from_weights(start: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(start + bytes(100))
    assert refusal(path) == (
        "the file is a pickle or zip archive, not safetensors. "
        "Convert it to safetensors; renaming does not."
    )


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x0580])
def test_a_header_whose_length_reads_like_a_pickle_is_no_pickle(
    length: int, tmp_path: Path
) -> None:
    header = json.dumps({"w": W}).ljust(length)
    assert Checkpoint.open(write(tmp_path / "model.safetensors", header, 8)).names == ("w",)


def reference(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """What safetensors itself makes of a file, None where it refuses."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return None
    return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each read of a file."""
    pread = os.pread
    found: list[int] = []

    def counting(descriptor: int, count: int, offset: int) -> bytes:
        data = pread(descriptor, count, offset)
        found.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", counting)
    return found


def ours(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    try:
        checkpoint = Checkpoint.open(path)
    except CheckpointError:
        return None
    return {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()}


def test_mutated_headers_are_refused_or_read_as_the_reference_reads_them(
    tmp_path: Path, reads: list[int], record_property: Callable[[str, object], None]
) -> None:
    chance = random.Random(0)
    header = {
        "__metadata__": {"format": "pt"},
        "model.embed.weight": entry("F32", [4, 3], 0),
        "model.layers.0.weight": entry("BF16", [3, 3], 48),
        "model.layers.0.bias": entry("F16", [3], 66),
        "model.mask": entry("BOOL", [5], 72),
        "steps": entry("I64", [], 77),
    }
    path = write(tmp_path / "model.safetensors", header, 85)
    original = path.read_bytes()
    end = len(original) - 85
    accepted = 0
    for _ in range(ROUNDS):
        mutant = bytearray(original)
        for _ in range(chance.choice([1, 1, 1, 2, 4])):
            place = chance.randrange(end)
            kind = chance.randrange(4)
            if kind == 0:
                mutant[place] ^= 1 << chance.randrange(8)
            elif kind == 1:
                mutant[place] = chance.choice(b'{}[]",:0123456789FBIU\\ u')
            elif kind == 2:
                mutant[place : place + 1] = mutant[place : place + 1] * 2
            else:
                del mutant[place]
        overwrite(path, mutant)
        reads.clear()
        mine = ours(path)  # anything but a CheckpointError fails the test
        assert sum(reads) <= 64 + len(mutant)  # the first bytes, then the header once at most
        if mine is not None:
            accepted += 1
            assert mine == reference(path), bytes(mutant)
    assert 0 < accepted < ROUNDS / 5
    record_property(
        "figure",
        f"{ROUNDS:,} mutants: {ROUNDS - accepted:,} refused in words, {accepted:,} read as the"
        " reference reads them",
    )


def random_header(chance: random.Random) -> tuple[str, int]:
    """A header that is mostly right, with a fault here and there; and so many bytes of data."""
    position = chance.choice([0] * 30 + [1, 4])
    entries = []
    for number in range(chance.randrange(1, 5)):
        dtype = chance.choice([*ITEM_BYTES, *ITEM_BYTES, "F4", "F8_E4M3", "F64", "X1"])
        shape = [chance.choice([0, 1, 2, 3]) for _ in range(chance.randrange(4))]
        count = 1
        for size in shape:
            count *= size
        size = count * ITEM_BYTES.get(dtype, 1)
        fields = [
            f'"dtype":"{dtype}"',
            f'"shape":{json.dumps(shape)}',
            f'"data_offsets":[{position},{position + size}]',
        ]
        if chance.random() < 0.03:
            fields.append(chance.choice(['"dtype":"F32"', '"more":1', '"shape":[-0]']))
        if chance.random() < 0.02:
            fields.pop(chance.randrange(len(fields)))
        chance.shuffle(fields)
        name = chance.choice(["w", f"w{number}", f"w{number}", f"w{number}", "../w", "\\u0000", ""])
        entries.append(f'"{name}":{{{",".join(fields)}}}')
        position += size + chance.choice([0] * 40 + [1, -1])
    if chance.random() < 0.3:
        entries.append(chance.choice(['"__metadata__":{"a":"b"}', '"__metadata__":null']))
    chance.shuffle(entries)
    blank = chance.choice([""] * 20 + [" ", "\n"])
    return f"{blank}{{{','.join(entries)}}}{' ' * chance.randrange(3)}", max(0, position)


def test_whatever_header_we_accept_the_reference_accepts_as_the_same(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    chance = random.Random(0)
    path = tmp_path / "model.safetensors"
    accepted = 0
    for _ in range(ROUNDS):
        header, data = random_header(chance)
        write(path, header, max(0, data + chance.choice([0] * 30 + [1, -1])))
        mine = ours(path)
        if mine is not None:
            accepted += 1
            assert mine == reference(path), header
    assert ROUNDS / 20 < accepted < ROUNDS
    record_property("figure", f"{ROUNDS:,} headers: {accepted:,} accepted, by the reference too")


def test_the_header_of_a_large_model_is_read_once_and_nothing_after_it(
    tmp_path: Path, reads: list[int]
) -> None:
    header: dict[str, Any] = {}
    for number in range(700):
        header[f"model.layers.{number // 10}.part{number % 10}.weight"] = entry(
            "BF16", [2, 2], number * 8
        )
    path = write(tmp_path / "model.safetensors", header, 5600)
    Checkpoint.open(path)
    assert reads == [64, path.stat().st_size - 5600 - 8]
