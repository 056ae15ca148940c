"""The plugin ``object_store``: loads what ``from_pretrained`` does, and fetches nothing twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import stores
import torch
from transformers import AutoModelForCausalLM

import llmload
from llmload.plugin import Checkpoint, installed_transformers
from llmload.testing import assert_plugin, losses, parameters, run_on_ranks, same
from llmload_object_store.plugin import ObjectStore

Make = Callable[..., Path]


class Place:
    """A model whose weights lie in a store, and what is there of it on this disk."""

    def __init__(self, source: Path, root: Path) -> None:
        self.source = source
        self.folder = root / "model"
        self.bucket = root / "bucket"
        self.bucket.mkdir(parents=True)
        weights = shutil.ignore_patterns("*.safetensors*")
        shutil.copytree(source, self.folder, ignore=weights)
        for file in source.glob("*.safetensors*"):
            shutil.copy(file, self.bucket)
        self.url = f"counted://{self.bucket}"

    def spec(self, **keys: Any) -> dict[str, Any]:
        return {"model": str(self.folder), "object_store": {"url": self.url}, **keys}

    def data(self) -> list[stores.Span]:
        """The tensors' bytes, file by file."""
        tensors = Checkpoint.open(self.bucket).tensors.values()
        return sorted((info.file.name, info.start, info.stop) for info in tensors)

    def errors(self, **keys: Any) -> list[str]:
        """What a plan says, or refuses with."""
        try:
            return [str(problem) for problem in llmload.plan(self.spec(**keys)).errors]
        except llmload.RequestError as error:
            return [str(problem) for problem in error.problems]


@pytest.fixture(autouse=True)
def _counted() -> Iterator[None]:
    stores.register()
    yield
    stores.Counted.given.clear()


@pytest.fixture(scope="module")
def source(llmload_checkpoint: Make) -> Path:
    return llmload_checkpoint("llama", shards=2, hidden_size=128, vocab_size=256)


@pytest.fixture
def place(source: Path, tmp_path: Path) -> Place:
    return Place(source, tmp_path)


def hold_to_from_pretrained(model: Any, source: Path, dtype: torch.dtype) -> None:
    options = installed_transformers().dtype_option(dtype)
    theirs = parameters(AutoModelForCausalLM.from_pretrained(source, **options))
    mine = parameters(model)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not same(mine[name], theirs[name])] == []


def joined(spans: list[stores.Span]) -> list[stores.Span]:
    """Put neighbours together; where two overlap, that is an error."""
    found: list[stores.Span] = []
    for name, start, stop in sorted(spans):
        if found and found[-1][0] == name:
            assert start >= found[-1][2], f"bytes from {start} on of {name} were fetched twice"
            if start == found[-1][2]:
                found[-1] = (name, found[-1][1], stop)
                continue
        found.append((name, start, stop))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as stored", "cast"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_every_parameter_is_the_one_of_from_pretrained(
    llmload_checkpoint: Make, tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    place = Place(llmload_checkpoint(model_type, shards=2), tmp_path)
    name = str(dtype).removeprefix("torch.")
    result = llmload.load(place.spec(dtype=name))
    assert result.report.loader == "streaming"
    hold_to_from_pretrained(result.model, place.source, dtype)


def test_each_byte_is_fetched_once_beside_headers_and_samples(place: Place) -> None:
    result = llmload.load(place.spec())
    given = stores.placed(stores.Counted.given)
    assert joined([s for s in given if s not in stores.headers(given)]) == joined(place.data())
    files = result.report.facts["streaming"]["files"]
    assert all(file["bytes_read"] == file["tensor_bytes"] for file in files.values())


def test_a_plan_fetches_headers_and_no_weight(place: Place) -> None:
    plan = llmload.plan(place.spec())
    assert not plan.errors
    assert plan.checkpoint_bytes == sum(stop - start for _, start, stop in place.data())
    first = {name: start for name, start, _ in reversed(place.data())}
    fetched = [span for span in stores.Counted.given if span[0] in first]
    assert fetched
    assert all(stop <= first[name] for name, _, stop in fetched)


@pytest.mark.slow
def test_each_of_two_ranks_fetches_its_own_part_and_nothing_of_the_others(place: Place) -> None:
    pytest.importorskip("deepspeed")
    arguments = (str(place.folder), place.url)
    ranks = run_on_ranks(stores.on_a_rank, *arguments, ranks=2, process_group=False, timeout=240)
    total = sum(stop - start for _, start, stop in place.data())
    all_of_them = []
    for found in ranks:
        assert found["loader"] == "streaming"
        given = stores.placed(found["given"])
        mine = [span for span in given if span not in stores.headers(given)]
        assert sum(stop - start for _, start, stop in mine) == found["read"] == total // 2
        all_of_them += mine
    assert joined(all_of_them) == joined(place.data())
    theirs = parameters(AutoModelForCausalLM.from_pretrained(place.source))
    for found in ranks:
        assert all(same(value, theirs[name].data) for name, value in found["values"].items())


def test_weights_come_over_http_in_parts(place: Place) -> None:
    pytest.importorskip("aiohttp")
    with stores.serving(place.bucket) as (url, given):
        place.url = url
        result = llmload.load(place.spec(dtype="bfloat16"))
    hold_to_from_pretrained(result.model, place.source, torch.bfloat16)
    parts = stores.placed(given)
    assert joined([s for s in parts if s not in stores.headers(parts)]) == joined(place.data())


def test_from_pretrained_takes_what_is_fetched(place: Place) -> None:
    registry = llmload.create_registry(block={"streaming"})
    result = llmload.load(place.spec(), registry=registry)
    assert result.report.loader == "transformers"
    hold_to_from_pretrained(result.model, place.source, torch.float32)


def test_an_adapter_is_trained_on_such_weights(place: Place) -> None:
    model = llmload.load(place.spec(dtype="bfloat16", lora={"r": 4})).model
    first, *_, last = losses(model, 5)
    assert last < first


def test_a_tensor_that_is_missing_is_refused_in_the_plan(place: Place) -> None:
    index = json.loads((place.bucket / "model.safetensors.index.json").read_text())
    last = max(index["weight_map"].values())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != last}
    (place.bucket / "model.safetensors.index.json").write_text(json.dumps(index))
    (error,) = place.errors()
    assert "the checkpoint has no values for" in error


def test_a_shard_that_is_not_there_is_named(place: Place) -> None:
    shard = max(place.bucket.glob("*.safetensors"))
    shard.unlink()
    assert place.errors() == [
        f"object_store.url: there is no {place.url}/{shard.name}. Give the address of a folder that"
        " save_pretrained wrote, all of it uploaded."
    ]


def test_a_shard_that_is_cut_off_is_named(place: Place) -> None:
    shard = max(place.bucket.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-5])
    (error,) = place.errors()
    assert shard.name in error
    assert "the file is cut off" in error


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "cannot be read: "),
        ("[]", "cannot be read: it has no weight_map"),
        ('{"weight_map": {}}', "cannot be read: it has no weight_map"),
        ('{"weight_map": {"w": 1}}', "cannot be read: its weight_map names no files"),
        ('{"weight_map": {"w": "../x.safetensors"}}', "names '../x.safetensors', which is no file"),
        ('{"weight_map": {"w": "x.bin"}}', "names 'x.bin', which is no file of safetensors"),
    ],
)
def test_an_index_that_is_none_is_refused(place: Place, index: str, message: str) -> None:
    (place.bucket / "model.safetensors.index.json").write_text(index)
    (error,) = place.errors()
    assert error.startswith(f"object_store.url: {place.url}/model.safetensors.index.json {message}")


@pytest.mark.parametrize("url", ["nosuch://bucket/model", "counted:///no/such/folder"])
def test_an_address_where_nothing_is_is_refused(place: Place, url: str) -> None:
    place.url = url
    (error,) = place.errors()
    assert url in error


def test_a_path_is_no_address(place: Place) -> None:
    place.url = "models/llama"
    (error,) = place.errors()
    assert error.startswith("object_store.url: ")


def test_what_changes_in_the_store_while_it_is_loaded_fails_the_load(place: Place) -> None:
    class Changes:
        name = "changes"

        @llmload.hookimpl
        def post_load(self, ctx: llmload.LoadContext, model: Any) -> Any:
            if not ctx.rehearsing:
                shard = max(place.bucket.glob("*.safetensors"))
                shard.write_bytes(shard.read_bytes() + b"\0")
            return model

    registry = llmload.create_registry([Changes])
    with pytest.raises(llmload.AuditError, match="changed in the store while the model was loaded"):
        llmload.load(place.spec(), registry=registry)


def test_a_store_that_sends_less_than_was_asked_for_fails_the_load(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stores.Counted.cat_file

    def short(self: Any, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        data = whole(self, path, start, end, **kwargs)
        return data[:-1] if len(data) > stores.SMALL and start != 8 else data

    monkeypatch.setattr(stores.Counted, "cat_file", short)
    with pytest.raises(llmload.CheckpointError, match=r"gave \d+ bytes of the \d+ from \d+ on"):
        llmload.load(place.spec())


def test_random_weights_and_other_files_cannot_be_asked_for_too(place: Place) -> None:
    (error,) = place.errors(weights="random")
    assert "nothing is fetched for random weights" in error
    (error,) = place.errors(weights_from=str(place.bucket))
    assert "both say where the weights are" in error


def test_a_signature_of_the_folder_does_not_cover_what_is_fetched(
    place: Place, tmp_path: Path
) -> None:
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from model_signing import signing

    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (tmp_path / "key.pem").write_bytes(private)
    (tmp_path / "key.pub").write_bytes(public)
    bundle = tmp_path / "model.sig"
    config = signing.Config().use_elliptic_key_signer(private_key=tmp_path / "key.pem")
    config.sign(place.folder, bundle)
    signature = {"bundle": str(bundle), "public_key": str(tmp_path / "key.pub")}
    (error,) = place.errors(verify={"signature": signature})
    assert error.startswith("verify.signature: the signature covers the folder")
    assert "of the weights lie elsewhere" in error


@pytest.mark.slow
def test_the_plugin_keeps_the_contract(source: Path) -> None:
    spec = {"object_store": {"url": f"file://{source}"}}
    bad = [{"url": "models"}, {"url": "file:///no/such/folder"}, {}]
    assert_plugin(ObjectStore, spec=spec, bad=bad, folder=source)
