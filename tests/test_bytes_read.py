"""Every loader says how many bytes of each file it read, and it is each tensor's bytes once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import architectures
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from sameness import differences, from_pretrained
from stacks import needs_bitsandbytes, needs_safe_pickles, needs_transformers_5
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_utils

import llmload
from llmload.builtin.transformers.plugin import quantised_by_bitsandbytes
from llmload.hf.counted_reads import CountedReads
from llmload.testing import edit_config, tiny_llama, tiny_model

NORM = "model.norm.weight"


def load(folder: Path, loader: str = "transformers", **keys: Any) -> llmload.LoadResult:
    block = {"streaming"} if loader == "transformers" else set()
    registry = llmload.create_registry(block=block, environ={})
    result = llmload.load({"model": str(folder), **keys}, registry=registry)
    assert result.report.loader == loader
    return result


def files(result: llmload.LoadResult) -> dict[str, dict[str, Any]]:
    return result.report.facts[result.report.loader]["files"]  # type: ignore[no-any-return]


def assert_once(result: llmload.LoadResult) -> None:
    found = files(result).values()
    assert all(file["bytes_read"] == file["tensor_bytes"] > 0 for file in found)
    read = sum(file["bytes_read"] for file in found)
    assert read == result.plan.checkpoint_bytes == result.report.checkpoint_bytes


# --- from_pretrained ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_from_pretrained_is_counted_as_the_streaming_loader_is(
    shards: int, dtype: str, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path, shards=shards, dtype=torch.bfloat16)
    theirs, ours = load(folder, dtype=dtype), load(folder, "streaming", dtype=dtype)
    assert_once(theirs)
    assert files(theirs) == files(ours)
    assert files(theirs).keys() == {path.name for path in folder.glob("*.safetensors")}


MERGED_OR_TIED = {"mixtral": "causal_lm", "gpt2": "causal_lm", "t5": "seq2seq_lm"}


@pytest.mark.parametrize("model_type", MERGED_OR_TIED)
@pytest.mark.parametrize("loader", ["streaming", "transformers"])
def test_merged_and_tied_weights_are_read_once(
    loader: str, model_type: str, tmp_path: Path
) -> None:
    kind = MERGED_OR_TIED[model_type]
    architectures.build(kind, model_type).to(torch.bfloat16).save_pretrained(tmp_path)
    assert_once(load(tmp_path, loader, auto_class=kind, dtype="float32"))


def test_what_has_no_place_in_the_model_is_not_read(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"extra": torch.ones(8)}, path, metadata={"format": "pt"})
    for loader in ("streaming", "transformers"):
        (file,) = files(load(folder, loader, strict={"allow_unexpected": ["extra"]})).values()
        assert file["bytes_read"] == file["tensor_bytes"] - 8 * 4


@pytest.mark.parametrize("loader", ["streaming", "transformers"])
def test_tensors_under_new_names_are_counted_too(loader: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    path = folder / "model.safetensors"
    tensors = {f"old.{name}": tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors | {"old.extra": torch.ones(8)}, path, metadata={"format": "pt"})
    strict = {"allow_unexpected": ["extra"]}
    (file,) = files(load(folder, loader, key_map={"^old\\.": ""}, strict=strict)).values()
    assert file["bytes_read"] == file["tensor_bytes"] - 8 * 4
    assert file["reads"] == len(tensors)


@pytest.mark.parametrize("fails", [False, True])
def test_what_opens_files_is_as_before_whatever_happens(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = tiny_llama(tmp_path), []
    before = (modeling_utils.safe_open, torch.load)

    def watch(*args: Any, **options: Any) -> Any:
        seen.append((modeling_utils.safe_open, torch.load))
        if fails:
            raise MemoryError("no room")
        return original(*args, **options)

    original = PreTrainedModel._load_pretrained_model
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(watch))
    if fails:
        with pytest.raises(llmload.LoadFailedError, match="MemoryError: no room"):
            load(folder)
    else:
        load(folder)
    (during,) = seen
    assert all(now is not then for now, then in zip(during, before, strict=True))
    assert (modeling_utils.safe_open, torch.load) == before
    assert before[0] is safetensors.safe_open


def test_a_file_that_is_opened_unseen_is_not_said_to_be_unread(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    spec = llmload.create_registry(environ={}).validate({"model": str(folder)})
    checkpoint = llmload.checkpoint.Checkpoint.open(folder)
    assert spec.weights == "pretrained"
    with CountedReads(checkpoint) as counts:
        load_file(folder / "model.safetensors")
    (file,) = counts.facts()["files"].values()
    assert (file["bytes_read"], file["reads"]) == (None, 0)


# --- pickles ------------------------------------------------------------------------------------


def pickled(tmp_path: Path, *, sharded: bool) -> Path:
    """A folder whose weights are a ``.bin``, or two behind an index, with a config that only
    ``from_pretrained`` carries out."""
    folder = tiny_llama(tmp_path, dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if not sharded:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        parts = {"pytorch_model-00001-of-00002.bin": {}, "pytorch_model-00002-of-00002.bin": {}}
        where = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            where[name] = list(parts)[number % 2]
            parts[where[name]][name] = tensor
        for file, state in parts.items():
            torch.save(state, folder / file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return edit_config(folder, fusion_config={})


@needs_safe_pickles
@needs_transformers_5
@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_from_pretrained_takes_over_for_allowed_pickles(
    sharded: bool, dtype: str, tmp_path: Path
) -> None:
    folder = pickled(tmp_path, sharded=sharded)
    spec = {"model": str(folder), "allow_pickle": True, "dtype": dtype}
    reason = "the config sets fusion_config, which only from_pretrained carries out"
    plan = llmload.plan(spec)
    assert (plan.loader, plan.declined) == ("transformers", {"streaming": reason})
    result = llmload.load(spec)
    assert (result.report.loader, result.report.declined) == (plan.loader, plan.declined)
    theirs = from_pretrained(AutoModelForCausalLM, folder, dtype)
    assert differences(result.model, theirs) == []
    own = tiny_model(dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(v, own[n].to(v.dtype)) for n, v in result.model.state_dict().items())
    assert_once(result)
    assert files(result).keys() == {path.name for path in folder.glob("*.bin")}
    assert "no tensor is on the meta device" in result.report.audit
    assert result.report.compared == len(list(result.model.parameters()))


@needs_safe_pickles
@needs_transformers_5
def test_a_key_that_a_pickle_lacks_is_an_error_for_from_pretrained_too(tmp_path: Path) -> None:
    folder = pickled(tmp_path, sharded=False)
    path = folder / "pytorch_model.bin"
    tensors = torch.load(path)
    torch.save({name: tensor for name, tensor in tensors.items() if name != NORM}, path)
    with pytest.raises(llmload.PlanError, match=f"the checkpoint has no values for '{NORM}'"):
        llmload.load({"model": str(folder), "allow_pickle": True})


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_pickles_that_are_not_allowed_are_refused_before_any_loader_is_asked(
    sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pickled(tmp_path, sharded=sharded)
    monkeypatch.setattr(torch, "load", None)
    name = "pytorch_model.bin.index.json" if sharded else "pytorch_model.bin"
    for ask in (llmload.plan, llmload.load):
        with pytest.raises(llmload.CheckpointError) as caught:
            ask({"model": str(folder)})
        assert str(caught.value) == (
            f"{folder / name}: the only weights here are a pickle, and opening a pickle can run"
            " code. Convert it to safetensors elsewhere, or set allow_pickle: true with torch >="
            " 2.10."
        )


# --- quantised ----------------------------------------------------------------------------------


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("loader", ["streaming", "transformers"])
def test_weights_are_quantised_from_one_read(loader: str, bits: int, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, dtype=torch.bfloat16, shards=2)
    assert_once(load(folder, loader, kbit={"bits": bits}))


@needs_bitsandbytes
def test_a_folder_that_is_quantised_already_is_read_once(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, dtype=torch.bfloat16)
    load(folder, "streaming", kbit={"bits": 4}).model.save_pretrained(tmp_path / "quantised")
    result = load(tmp_path / "quantised", "transformers", kbit={})
    assert_once(result)
    assert quantised_by_bitsandbytes(result.model.config)
