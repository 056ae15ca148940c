"""Weights of a layout that a plugin describes: held to the rules, locked, shared and signed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_hookspecs import example_of

import llmload
from llmload.checkpoint.digests import of_samples
from llmload.loading import lock
from llmload.loading.planning import Download, prepare
from llmload.plugin import Checkpoint, CheckpointFile, MappedCheckpoint, TensorInfo
from llmload.testing import parameters, same, tiny_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model")


class Fetches:
    """Hands out the folder's own file of safetensors as one that has to be fetched."""

    name = "fetches"

    def __init__(self, version: str = "") -> None:
        self.version = version
        self.fetched: list[tuple[int, int]] = []

    def file(self, folder: Path) -> CheckpointFile:
        data = (folder / "model.safetensors").read_bytes()

        def fetch(spans: Iterable[tuple[int, memoryview]]) -> None:
            for start, into in spans:
                into[:] = data[start : start + len(into)]
                self.fetched.append((start, start + len(into)))

        return CheckpointFile.fetched(
            "store://somewhere/model.safetensors", len(data), fetch, version=self.version
        )

    @llmload.hookimpl
    def open_checkpoint(self, folder: Path) -> Checkpoint:
        file = self.file(folder)
        return Checkpoint.described(folder, [file], file.safetensors())


def registry_of(*plugins: object) -> llmload.Registry:
    return llmload.create_registry(list(plugins), environ={})


def test_the_example_reads_a_file_without_a_header(folder: Path) -> None:
    wanted = load_file(folder / "model.safetensors")
    listed, data = {}, b""
    for name, tensor in wanted.items():
        piece = tensor.numpy().tobytes()
        listed[name] = ("F32", list(tensor.shape), len(data), len(data) + len(piece))
        data += piece
    (folder / "weights.blob").write_bytes(data)
    (folder / "weights.json").write_text(json.dumps(listed))
    (folder / "model.safetensors").unlink()
    registry = registry_of(example_of("open_checkpoint"))
    result = llmload.load({"model": str(folder), "blob": {}}, registry=registry)
    found = parameters(result.model)
    assert all(same(found[name], tensor) for name, tensor in wanted.items())
    assert result.report.facts["streaming"]["mapped"] == len(wanted)
    (folder / "weights.blob").write_bytes(data[:-4])
    with pytest.raises(llmload.CheckpointError, match=r"lies at bytes \d+ to \d+ of \d+"):
        llmload.plan({"model": str(folder), "blob": {}}, registry=registry)


def described(tmp_path: Path, **change: Any) -> Checkpoint:
    path = tmp_path / "weights.blob"
    path.write_bytes(bytes(16))
    file = CheckpointFile.on_disk(path, tmp_path)
    info = TensorInfo("w", file.path, "F32", (4,), 0, 16)
    return Checkpoint.described(tmp_path, [file], [dataclasses.replace(info, **change)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../w"}, "the tensor name '../w' is not allowed"),
        ({"dtype": "float32"}, "tensor 'w' has the unknown dtype 'float32'"),
        ({"shape": (-4,)}, "tensor 'w' of dtype F32 and shape [-4] needs -16 bytes"),
        ({"shape": (4.0,)}, "tensor 'w' has the impossible shape"),
        ({"shape": (3,)}, "tensor 'w' of dtype F32 and shape [3] needs 12 bytes"),
        ({"start": 4, "stop": 20}, "tensor 'w' lies at bytes 4 to 20 of 16"),
        ({"start": -16, "stop": 0}, "tensor 'w' lies at bytes -16 to 0 of 16"),
        ({"file": Path("/elsewhere")}, "tensor 'w' is in no file of the checkpoint"),
    ],
)
def test_what_a_plugin_says_of_a_tensor_is_held_to_the_rules_of_a_header(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(llmload.CheckpointError) as caught:
        described(tmp_path, **change)
    assert message in str(caught.value)


def test_names_and_files_are_described_once(tmp_path: Path) -> None:
    checkpoint = described(tmp_path)
    (file,), (info,) = checkpoint.files, checkpoint.tensors.values()
    for files, tensors, message in (
        ([file], [info, info], "two tensors are called 'w'"),
        ([file, file], [info], "two files of the checkpoint have one path"),
    ):
        with pytest.raises(llmload.CheckpointError) as caught:
            Checkpoint.described(tmp_path, files, tensors)
        assert message in str(caught.value)


def test_of_two_plugins_that_describe_the_weights_none_is_taken(folder: Path) -> None:
    class Also(Fetches):
        name = "also"

    with pytest.raises(llmload.CheckpointError) as caught:
        llmload.plan({"model": str(folder)}, registry=registry_of(Fetches(), Also()))
    assert str(caught.value) == (
        "model: the plugins 'also' and 'fetches' each say where the weights lie. Keep the section"
        " of one of them."
    )


def test_something_else_than_a_checkpoint_is_the_plugins_fault(folder: Path) -> None:
    class Wrong:
        name = "wrong"

        @llmload.hookimpl
        def open_checkpoint(self, folder: Path) -> Path:
            return folder

    with pytest.raises(llmload.PluginError, match="returned a PosixPath from open_checkpoint"):
        llmload.plan({"model": str(folder)}, registry=registry_of(Wrong()))


def test_a_plugin_that_does_not_know_the_layout_leaves_it_to_llmload(folder: Path) -> None:
    class Unknowing:
        name = "unknowing"

        @llmload.hookimpl
        def open_checkpoint(self) -> None:
            return None

    plan = llmload.plan({"model": str(folder)}, registry=registry_of(Unknowing()))
    assert not plan.errors


@pytest.mark.parametrize("keys", [{}, {"dtype": "bfloat16"}, {"streaming": {"digests": True}}])
def test_what_is_fetched_is_what_is_loaded(folder: Path, keys: dict[str, Any]) -> None:
    plugin = Fetches()
    spec = {"model": str(folder), **keys}
    mine = parameters(llmload.load(spec, registry=registry_of(plugin)).model)
    theirs = parameters(llmload.load(spec).model)
    assert all(same(mine[name], theirs[name]) for name in theirs)


def test_a_part_of_a_tensor_is_fetched_and_no_more(folder: Path) -> None:
    plugin = Fetches()
    file = plugin.file(folder)
    checkpoint = Checkpoint.described(folder, [file], file.safetensors())
    info = max(checkpoint.tensors.values(), key=lambda info: info.nbytes)
    plugin.fetched.clear()
    with MappedCheckpoint(checkpoint) as files:
        tensor = files.unread(info)
        assert plugin.fetched == []
        part = tensor.view(-1)[8:24]
        files.ask(info, part)
        assert plugin.fetched == [(info.start + 32, info.start + 96)]
        assert files.bytes_read == {file.path: 64}
        assert torch.equal(part, files.tensor(info).view(-1)[8:24])
        assert files.part(info, 0, 8) is None


def test_a_version_stands_for_what_is_in_a_fetched_file(folder: Path) -> None:
    digests = {}
    for version in ("", "one", "two"):
        plugin = Fetches(version)
        file = plugin.file(folder)
        checkpoint = Checkpoint.described(folder, [file], file.safetensors())
        plugin.fetched.clear()
        digests[version] = of_samples(checkpoint)
        assert bool(plugin.fetched) == (not version)
    assert len(set(digests.values())) == 3
    assert digests[""] == of_samples(Checkpoint.open(folder))


@pytest.mark.refused_late
def test_a_fetched_file_is_locked_by_its_bytes(folder: Path, tmp_path: Path) -> None:
    registry = registry_of(Fetches())
    spec = {"model": str(folder)}
    made = lock.make(prepare(registry.validate(spec), registry, download=Download.ALL))
    lock.write(made, tmp_path / "lock")
    locked = spec | {"lock": str(tmp_path / "lock")}
    llmload.load(locked, registry=registry)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(llmload.CheckpointError, match=r"the file .+ has the SHA-256"):
        llmload.load(locked, registry=registry_of(Fetches()))


def test_models_of_a_group_do_not_share_pages_of_a_fetched_file(folder: Path) -> None:
    group = {"models": {"one": {"model": str(folder)}, "two": {"model": str(folder)}}}

    def shared(registry: llmload.Registry) -> list[Any]:
        return [found.how for found in llmload.plan_group(group, registry=registry).shared]

    assert shared(registry_of()) == ["checkpoint pages"]
    assert shared(registry_of(Fetches("one"))) == []


def test_a_claimed_tensor_is_fetched_for_its_plugin(folder: Path) -> None:
    class Claims:
        name = "claims"
        seen: torch.Tensor | None = None

        @llmload.hookimpl
        def map_keys(self, ctx: llmload.LoadContext, keys: tuple[str, ...]) -> dict[str, None]:
            return {"lm_head.weight": None}

        @llmload.hookimpl
        def post_load(self, ctx: llmload.LoadContext, model: Any) -> Any:
            if not ctx.rehearsing:
                Claims.seen = ctx.read("lm_head.weight")
            return model

    spec = {"model": str(folder), "strict": {"allow_missing": ["lm_head.weight"]}}
    llmload.load(spec, registry=registry_of(Fetches(), Claims()))
    assert Claims.seen is not None
    assert same(Claims.seen, load_file(folder / "model.safetensors")["lm_head.weight"])
