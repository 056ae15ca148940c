"""Which files of a folder are its weights, that they are whole, and that they lie in the folder."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from raw_files import entry, write

from llmload.checkpoint import Checkpoint
from llmload.errors import CheckpointError

INDEX = "model.safetensors.index.json"
WHOLE = "Download or save the whole folder again."
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def save_index(folder: Path, weight_map: object) -> Path:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def three_shards(folder: Path, *, tensor_bytes: int = 8) -> Path:
    """Tensors a, b, c of U8, one in each of three shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, shard in zip("abc", SHARDS, strict=True):
        write(folder / shard, {name: entry("U8", [tensor_bytes], 0)}, tensor_bytes)
    return save_index(folder, dict(zip("abc", SHARDS, strict=True)))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    return str(caught.value)


def single(folder: Path, name: str = "model.safetensors", tensor: str = "w") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write(folder / name, {tensor: entry("F32", [2], 0)}, 8)


# --- choosing ---------------------------------------------------------------------------------


def test_one_file_is_taken_before_an_index_as_transformers_does(tmp_path: Path) -> None:
    three_shards(tmp_path)
    single(tmp_path)
    assert Checkpoint.open(tmp_path).names == ("w",)


def test_an_index_is_followed_to_its_shards(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(three_shards(tmp_path))
    assert checkpoint.names == ("a", "b", "c")
    assert [file.name for file in checkpoint.files] == SHARDS
    assert checkpoint["b"].file == (tmp_path / SHARDS[1]).resolve()
    assert checkpoint.root == tmp_path
    assert checkpoint.format == "safetensors"
    assert checkpoint.total_bytes == 24


def test_a_single_shard_or_an_index_file_can_be_opened_by_its_own_path(tmp_path: Path) -> None:
    three_shards(tmp_path)
    assert Checkpoint.open(tmp_path / SHARDS[2]).names == ("c",)
    assert Checkpoint.open(str(tmp_path / INDEX)).names == ("a", "b", "c")


def test_a_shard_may_lie_in_a_folder_within(tmp_path: Path) -> None:
    single(tmp_path / "parts", "one.safetensors")
    assert Checkpoint.open(save_index(tmp_path, {"w": "parts/one.safetensors"})).names == ("w",)


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    assert refusal(path) == f"{path}: there is no checkpoint at {path}. Check the path."


@pytest.mark.parametrize(
    ("found", "listing"),
    [
        ([], "nothing"),
        (["config.json", "vocab.txt"], "config.json, vocab.txt"),
        ([f"{n}.txt" for n in range(9)], ", ".join(f"{n}.txt" for n in range(8)) + ", ..."),
    ],
)
def test_a_folder_without_weights_is_refused_with_what_it_holds(
    found: list[str], listing: str, tmp_path: Path
) -> None:
    for name in found:
        (tmp_path / name).touch()
    assert refusal(tmp_path) == (
        f"{tmp_path}: the folder holds neither model.safetensors nor {INDEX}; found {listing}. "
        "Give a folder written by save_pretrained, or name where the weights are in"
        " `weights_from`."
    )


def test_describing_a_folder_imports_no_torch(tmp_path: Path) -> None:
    three_shards(tmp_path)
    code = (
        "import sys; from llmload.checkpoint import Checkpoint; "
        f"Checkpoint.open({str(tmp_path)!r}); "
        "print({'torch', 'transformers', 'numpy', 'safetensors'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr


# --- index and shards agree -------------------------------------------------------------------


def test_a_shard_that_lacks_a_promised_tensor_is_named(tmp_path: Path) -> None:
    three_shards(tmp_path)
    save_index(tmp_path, {"a": SHARDS[0], "b": SHARDS[1], "x": SHARDS[1], "c": SHARDS[2]})
    assert refusal(tmp_path) == (
        f"{tmp_path / SHARDS[1]}: the index places 'x' in this shard, which does not hold it. "
        f"{WHOLE}"
    )


def test_a_tensor_in_another_shard_than_promised_is_named(tmp_path: Path) -> None:
    three_shards(tmp_path)
    save_index(tmp_path, {"a": SHARDS[1], "b": SHARDS[0], "c": SHARDS[2]})
    assert refusal(tmp_path) == "\n".join(
        f"{tmp_path / shard}: the shard holds {held!r}, which the index places in {other}. "
        f"{WHOLE}\n"
        f"{tmp_path / shard}: the index places {said!r} in this shard, which does not hold it. "
        f"{WHOLE}"
        for shard, held, other, said in (
            (SHARDS[0], "a", SHARDS[1], "b"),
            (SHARDS[1], "b", SHARDS[0], "a"),
        )
    )


def test_a_tensor_that_the_index_does_not_list_is_named(tmp_path: Path) -> None:
    three_shards(tmp_path)
    write(tmp_path / SHARDS[0], {n: entry("U8", [1], i) for i, n in enumerate("aefgh")}, 5)
    assert refusal(tmp_path) == (
        f"{tmp_path / SHARDS[0]}: the shard holds 'e', 'f', 'g' and 1 more, which the index does "
        f"not list. {WHOLE}"
    )


def test_a_shard_beside_the_listed_ones_is_refused(tmp_path: Path) -> None:
    three_shards(tmp_path)
    save_index(tmp_path, {"a": SHARDS[0], "b": SHARDS[1]})
    assert refusal(tmp_path) == (
        f"{tmp_path / INDEX}: the index does not list {SHARDS[2]}, which lies beside its shards. "
        f"{WHOLE}"
    )


def test_shards_left_over_from_another_save_are_left_alone(tmp_path: Path) -> None:
    three_shards(tmp_path)
    single(tmp_path, "model-00001-of-00002.safetensors")
    single(tmp_path, "consolidated.safetensors")
    assert Checkpoint.open(tmp_path).names == ("a", "b", "c")


def test_every_missing_shard_is_named(tmp_path: Path) -> None:
    three_shards(tmp_path)
    for shard in SHARDS[:2]:
        (tmp_path / shard).unlink()
    assert refusal(tmp_path) == "\n".join(
        f"{tmp_path / shard}: the file is missing. Download or save the folder again."
        for shard in SHARDS[:2]
    )


def test_a_shard_cut_off_anywhere_is_refused_with_the_bytes(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    three_shards(tmp_path, tensor_bytes=20_000)
    whole = {shard: (tmp_path / shard).read_bytes() for shard in SHARDS}
    chance, cut_off = random.Random(0), 0
    for shard, content in whole.items():
        size = len(content)
        cuts = [*range(0, size, 1024), *(chance.randrange(size) for _ in range(64)), size - 1]
        cut_off += len(cuts)
        for cut in cuts:
            os.truncate(tmp_path / shard, cut)
            text = refusal(tmp_path)
            assert text.startswith(f"{tmp_path / shard}: ")
            assert str(cut) in text
            if cut > 8 + 100:
                assert text.endswith(
                    f"the file is cut off: expected {size} bytes, found {cut}. "
                    "Download or save the file again."
                )
            (tmp_path / shard).write_bytes(content)
    record_property("figure", f"{cut_off} places: all refused with the bytes")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[]", "the index has no weight_map of tensor names to file names"),
        (b"{}", "the index has no weight_map of tensor names to file names"),
        (b'{"weight_map": {}}', "the index has no weight_map of tensor names to file names"),
        (b'{"weight_map": {"a": 1}}', "the index has no weight_map of tensor names to file names"),
        (
            b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
            "the index is unreadable: key 'a' appears twice",
        ),
        (
            b"{",
            "the index is unreadable: not JSON at character 1: Expecting property name"
            " enclosed in double quotes",
        ),
        (
            b'{"weight_map": {"a": "x.safetensors", "b": "X.safetensors"}}',
            "the index names shards that differ in case only",
        ),
    ],
)
def test_a_wrong_index_is_refused_in_words(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(content)
    assert refusal(tmp_path) == f"{tmp_path / INDEX}: {reason}"


# --- nothing outside the folder ---------------------------------------------------------------

_opened: list[str] | None = None


def _note_opens(event: str, args: tuple[object, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(os.fspath(args[0]))  # type: ignore[call-overload]


sys.addaudithook(_note_opens)


@contextmanager
def opens() -> Iterator[list[str]]:
    """Collect the path of every file opened meanwhile."""
    global _opened
    _opened = seen = []
    try:
        yield seen
    finally:
        _opened = None


def hostile_names(outside: Path) -> Iterator[str]:
    """Several hundred ways to point out of a folder, or at no file."""
    target = f"{outside.name}/model.safetensors"
    ups = [
        "..",
        "../..",
        "a/..",
        "a/../..",
        "./..",
        "parts/../..",
        "..%2f",
        "\uff0e\uff0e",
        "\u2024\u2024",
        "..\u200b",
    ]
    seps = ["/", "\\", "//", "\\\\", "/./"]
    for up, sep in itertools.product(ups, seps):
        yield f"{up}{sep}{target}"
        yield f"{up}{sep}model.safetensors"
        yield f"parts{sep}{up}{sep}{target}"
    for root in [
        "/",
        "//",
        "\\",
        "\\\\",
        "C:",
        "C:\\",
        "C:/",
        "c:",
        "\\\\?\\",
        "\\\\server\\share\\",
    ]:
        yield f"{root}{target}"
        yield f"{root}model.safetensors"
        yield f"{root}{outside}/model.safetensors"
    yield str(outside / "model.safetensors")
    yield f"file://{outside}/model.safetensors"
    yield f"~/{target}"
    for tail in ["\0", "\n", "\r", " ", ".", "/", "/.", "\\", ":stream", "::$DATA", "?", "*", "|"]:
        yield f"model.safetensors{tail}"
        yield f"one{tail}.safetensors" if tail not in (".",) else "one..safetensors/."
    yield from ["one.bin", "one.pt", "one", "", ".", "..", "one.safetensors.json"]
    yield "one.SAFETENSORS"
    for code in [*range(1, 32), 127, *range(0x80, 0xA0), 0x200B, 0x202E, 0x2044, 0x2215, 0xFF0F]:
        yield f"one{chr(code)}.safetensors"
        yield f"..{chr(code)}{target}"


def test_no_name_in_an_index_leads_out_of_the_folder(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    outside = tmp_path / "outside"
    single(outside)
    folder = tmp_path / "level" / "model"
    single(folder / "parts", "one.safetensors")
    names = list(hostile_names(outside))
    assert len(names) > 300
    real = os.path.realpath(folder)
    for name in names:
        save_index(folder, {"w": name})
        with opens() as seen:
            text = refusal(folder)
        assert name in text or repr(name)[1:-1] in text or "missing" in text, text
        assert all(os.path.realpath(path).startswith(real) for path in seen), (name, seen)
    record_property("figure", f"{len(names)} names: no file outside was opened")


def test_the_refusal_of_a_shard_name_says_what_it_is(tmp_path: Path) -> None:
    save_index(tmp_path, {"w": "../x.safetensors"})
    assert refusal(tmp_path) == (
        f"{tmp_path}: the index names the shard '../x.safetensors', which is not a .safetensors "
        "file here"
    )


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    outside = single(tmp_path / "outside")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(outside)
    with opens() as seen:
        text = refusal(folder)
    assert text == (
        f"{folder / 'model.safetensors'}: a link leads out of the model folder, to "
        f"{os.path.realpath(outside)}. Copy the file into the folder, or name the folder that "
        "holds it."
    )
    assert seen == []


def test_a_shard_in_a_linked_folder_is_refused(tmp_path: Path) -> None:
    single(tmp_path / "outside", "one.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "parts").symlink_to(tmp_path / "outside")
    save_index(folder, {"w": "parts/one.safetensors"})
    assert "a link leads out of the model folder" in refusal(folder)


def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    single(tmp_path, "real.safetensors")
    (tmp_path / "model.safetensors").symlink_to("real.safetensors")
    assert Checkpoint.open(tmp_path).names == ("w",)


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    single(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    assert Checkpoint.open(tmp_path / "link").names == ("w",)


def test_a_hub_snapshot_may_link_to_its_own_blobs_only(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    single(repository / "blobs", "d1ge57")
    link = snapshot / "model.safetensors"
    link.symlink_to("../../blobs/d1ge57")
    assert Checkpoint.open(snapshot).names == ("w",)
    (snapshot / "sub").mkdir()
    (snapshot / "sub" / "model.safetensors").symlink_to("../../../blobs/d1ge57")
    assert Checkpoint.open(snapshot / "sub").names == ("w",)
    link.unlink()
    single(tmp_path / "hub" / "models--org--other" / "blobs", "d1ge57")
    link.symlink_to("../../../models--org--other/blobs/d1ge57")
    assert "a link leads out of the model folder" in refusal(snapshot)


def test_a_file_that_is_no_plain_file_is_refused_without_waiting(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    assert refusal(tmp_path) == f"{path}: this is not a plain file"
    path.unlink()
    path.mkdir()
    assert refusal(tmp_path) == f"{path}: this is not a plain file"
    path.rmdir()
    path.symlink_to("model.safetensors")
    assert refusal(tmp_path).startswith(f"{path}: the file cannot be opened: ")
