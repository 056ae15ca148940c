"""The streaming loader: each weight read once, placed once, or refused before any is read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from raw_files import write
from safetensors.torch import load_file, save_file
from sameness import differences, from_pretrained
from stacks import IS_MODERN
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

import llmload
from llmload.checkpoint.mapped import MappedCheckpoint
from llmload.checkpoint.placement import Plain, Source, Target
from llmload.checkpoint.proof import sha256
from llmload.hf import installed_transformers
from llmload.testing import edit_config, save_checkpoint, tiny_checkpoint, tiny_llama, tiny_model

EMBEDDING = "model.embed_tokens.weight"


def load(folder: Path, registry: Any = None, /, **keys: Any) -> llmload.LoadResult:
    return llmload.load({"model": str(folder), **keys}, registry=registry)


def facts(result: llmload.LoadResult) -> dict[str, Any]:
    assert result.report.loader == "streaming"
    return result.report.facts["streaming"]


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Rewrite the single weights file of ``folder``."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def refusal(folder: Path, registry: Any = None, /, **keys: Any) -> str:
    with pytest.raises(llmload.RequestError) as caught:
        load(folder, registry, **keys)
    return str(caught.value)


# --- placement --------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_of_the_same_dtype_stay_on_the_files_pages(shards: int, tmp_path: Path) -> None:
    result = load(tiny_llama(tmp_path, shards=shards, dtype=torch.bfloat16))
    found = facts(result)
    assert found["mapped"] == len(result.model.state_dict())
    assert found["copied"] == found["converted"] == 0
    assert (
        differences(result.model, from_pretrained(AutoModelForCausalLM, tmp_path / "llama")) == []
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_of_another_dtype_are_cast_once(dtype: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, dtype=torch.bfloat16)
    result = load(folder, dtype=dtype)
    found = facts(result)
    assert found["copied"] == len(result.model.state_dict())
    assert found["mapped"] == 0
    theirs = from_pretrained(AutoModelForCausalLM, folder, dtype=dtype)
    assert differences(result.model, theirs) == []


@pytest.mark.parametrize("shards", [1, 3])
def test_the_report_counts_every_byte_of_every_file_once(shards: int, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, shards=shards)
    files = facts(load(folder, dtype="bfloat16"))["files"]
    assert files.keys() == {path.name for path in folder.glob("*.safetensors")}
    assert all(file["bytes_read"] == file["tensor_bytes"] > 0 for file in files.values())


def test_writing_to_a_loaded_model_leaves_file_and_other_loads_alone(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    first, second = load(folder).model, load(folder).model
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.fill_(7)
    assert differences(second, from_pretrained(AutoModelForCausalLM, folder)) == []
    assert (folder / "model.safetensors").read_bytes() == before


class Watching(Plain):
    """Places as usual and remembers what it was asked."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.targets: dict[str, Target] = {}

    def prepare(self, model: Any) -> None:
        assert all(parameter.is_meta for parameter in model.parameters())
        self.seen.append("prepare")

    def place(self, target: Target, source: Source) -> torch.Tensor:
        assert getattr(target.module, target.attribute) is not None
        assert source.shape == target.like.shape
        assert target.like.is_meta
        self.targets[target.name] = target
        self.seen.append(target.name)
        return super().place(target, source)

    def finish(self, model: Any) -> None:
        assert not any(parameter.is_meta for parameter in model.parameters())
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        self.seen.append("finish")


def with_placement(placement: Any) -> llmload.Registry:
    """A registry with a plugin that sets ``placement``."""

    class Places:
        name = "places"

        @llmload.hookimpl
        def init_context(self, ctx: llmload.LoadContext) -> None:
            ctx.placement = placement

    return llmload.create_registry(plugins=[Places()])


def test_a_plugins_placement_is_asked_for_each_weight_between_prepare_and_finish(
    tmp_path: Path,
) -> None:
    placement = Watching()
    result = load(tiny_llama(tmp_path, tied=True), with_placement(placement), dtype="float16")
    names = [n for n in result.model.state_dict() if n != "lm_head.weight"]
    assert placement.seen[0] == "prepare"
    assert placement.seen[-1] == "finish"
    assert sorted(placement.seen[1:-1]) == sorted(names)
    assert {target.dtype for target in placement.targets.values()} == {torch.float16}
    assert {target.device for target in placement.targets.values()} == {torch.device("cpu")}


class FirstHalves(Plain):
    """Reads only the first half of each weight."""

    def place(self, target: Target, source: Source) -> torch.Tensor:
        value = torch.zeros(source.shape, dtype=source.dtype)
        half = value.numel() // 2
        value.view(-1)[:half] = source.flat(0, half)
        return value


def test_a_placement_that_asks_for_a_slice_reads_no_more(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    result = llmload.load(
        {"model": str(folder)}, registry=with_placement(FirstHalves()), prove=False
    )
    (file,) = facts(result)["files"].values()
    assert file["bytes_read"] == file["tensor_bytes"] / 2
    held = load_file(folder / "model.safetensors")[EMBEDDING].view(-1)
    placed = result.model.get_input_embeddings().weight.view(-1)
    half = held.numel() // 2
    assert torch.equal(placed[:half], held[:half])
    assert not placed[half:].any()


class Failing(Plain):
    def place(self, target: Target, source: Source) -> torch.Tensor:
        raise MemoryError("out of it")


def test_what_a_placement_raises_comes_out_as_the_cause(tmp_path: Path) -> None:
    with pytest.raises(llmload.LoadFailedError) as caught:
        load(tiny_llama(tmp_path), with_placement(Failing()))
    assert "failed in load: MemoryError: out of it. " in str(caught.value)
    assert isinstance(caught.value.__cause__, MemoryError)


@pytest.mark.refused_late
def test_a_placement_is_not_passed_over_where_the_streaming_loader_declines(tmp_path: Path) -> None:
    registry = llmload.create_registry(plugins=[PlacesByOptions])
    folder = tiny_llama(tmp_path)
    assert refusal(folder, registry) == (
        "plugin 'transformers': Watching places the weights of this load, and only the streaming"
        " loader asks it, which declined. See in the plan why it declined, or leave out the plugin"
        " that sets the placement."
    )
    PlacesByOptions.placement.replaceable = True
    assert load(folder, registry).report.loader == "transformers"


class PlacesByOptions:
    """Places the weights, and sets an option that the streaming loader does not know."""

    name = "places_by_options"
    placement: Any = Watching()

    @llmload.hookimpl
    def init_context(self, ctx: llmload.LoadContext) -> None:
        ctx.placement = self.placement
        ctx.load_options["offload_buffers"] = True


# --- keys -------------------------------------------------------------------------------------


def test_a_missing_weight_is_an_error_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MappedCheckpoint, "tensor", None)
    folder = edit_weights(tiny_llama(tmp_path), lambda w: w.pop("model.norm.weight"))
    assert refusal(folder) == (
        "strict: the checkpoint has no values for 'model.norm.weight'. Map the keys with `key_map`,"
        " or list what may be newly initialised in `strict: {allow_missing: [...]}`."
    )


def test_an_unexpected_weight_is_an_error_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MappedCheckpoint, "tensor", None)
    folder = edit_weights(tiny_llama(tmp_path), lambda w: w.update(extra=torch.ones(2)))
    assert refusal(folder) == (
        "strict: the model has no place for 'extra' of the checkpoint. Map the keys with `key_map`,"
        " or list what may be left out in `strict: {allow_unexpected: [...]}`."
    )


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_other_shapes_are_errors_before_anything_is_read(
    strict: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MappedCheckpoint, "tensor", None)
    folder = edit_weights(
        tiny_llama(tmp_path),
        lambda w: w.update({"model.norm.weight": torch.ones(17), EMBEDDING: torch.ones(16, 128)}),
    )
    fix = "Check that config.json and weights belong together."
    assert refusal(folder, strict=strict) == (
        f"{EMBEDDING}: the checkpoint has float32 (16, 128), the model takes float32 (128, 16). "
        f"{fix}\n"
        "model.norm.weight: the checkpoint has float32 (17,), the model takes float32 (16,). "
        f"{fix}"
    )


def test_a_parameter_stored_as_integers_is_an_error(tmp_path: Path) -> None:
    folder = edit_weights(
        tiny_llama(tmp_path),
        lambda w: w.update({"model.norm.weight": torch.ones(16, dtype=torch.int32)}),
    )
    assert refusal(folder) == (
        "model.norm.weight: the checkpoint has int32 (16,), the model takes float32 (16,). "
        "Check that config.json and weights belong together."
    )


def test_each_lost_or_renamed_weight_is_found(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    names = list(load_file(folder / "model.safetensors"))
    for number, name in enumerate(names):
        copy = tiny_llama(tmp_path, name=f"copy{number}")
        rename = number % 2

        def change(w: dict[str, torch.Tensor], name: str = name, rename: int = rename) -> None:
            value = w.pop(name)
            if rename:
                w[name + "s"] = value

        text = refusal(edit_weights(copy, change))
        assert f"no values for {name!r}" in text
        assert (f"no place for {name + 's'!r}" in text) == bool(rename)


def test_a_missing_weight_that_is_allowed_is_drawn_by_the_models_rules_and_listed(
    tmp_path: Path,
) -> None:
    folder = edit_weights(tiny_llama(tmp_path), lambda w: w.pop("lm_head.weight"))
    torch.manual_seed(3)
    result = load(folder, strict={"allow_missing": ["^lm_head"]})
    assert result.report.newly_initialised == {"lm_head.weight": "missing from the checkpoint"}
    torch.manual_seed(3)
    assert differences(result.model, from_pretrained(AutoModelForCausalLM, folder)) == []


def test_an_unexpected_weight_that_is_allowed_is_not_read(tmp_path: Path) -> None:
    folder = edit_weights(tiny_llama(tmp_path), lambda w: w.update(extra=torch.ones(2)))
    (file,) = facts(load(folder, strict=False))["files"].values()
    assert file["bytes_read"] == file["tensor_bytes"] - 8


def test_keys_are_renamed_as_the_spec_says(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    held = load_file(folder / "model.safetensors")

    def rename(w: dict[str, torch.Tensor]) -> None:
        for name in list(w):
            w["rwtranrsformer." + name] = w.pop(name)

    loaded = load(edit_weights(folder, rename), key_map={r"^rwtranrsformer\.": ""}).model
    assert loaded.state_dict().keys() == held.keys()
    assert all(torch.equal(value, held[name]) for name, value in loaded.state_dict().items())


def test_a_base_model_folder_fills_a_headed_model_and_the_reverse(tmp_path: Path) -> None:
    headed = tiny_llama(tmp_path)
    base = tmp_path / "base"
    from_pretrained(LlamaModel, headed).save_pretrained(base)
    result = load(headed, auto_class="base", strict={"allow_unexpected": ["^lm_head"]})
    assert differences(result.model, from_pretrained(LlamaModel, headed)) == []
    torch.manual_seed(0)
    result = load(base, strict={"allow_missing": ["^lm_head"]})
    torch.manual_seed(0)
    assert differences(result.model, from_pretrained(LlamaForCausalLM, base)) == []


# --- ties, buffers, modes, files beside the weights ---------------------------------------------


@pytest.mark.parametrize("stored", ["once", "twice", "as the head"])
def test_tied_weights_are_one_parameter_however_they_are_stored(
    stored: str, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path, tied=True)

    def change(w: dict[str, torch.Tensor]) -> None:
        if stored != "once":
            w["lm_head.weight"] = w[EMBEDDING].clone()
        if stored == "as the head":
            del w[EMBEDDING]

    edit_weights(folder, change)
    model = load(folder).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    if stored != "as the head" or IS_MODERN:  # 4.51.3 leaves it on meta
        assert differences(model, from_pretrained(AutoModelForCausalLM, folder)) == []


DIFFERENT = (
    "the config ties 'lm_head.weight' to '{}', and the checkpoint holds different values for them"
)


@pytest.mark.parametrize("loader", ["streaming", "transformers"])
@pytest.mark.parametrize("lora", [None, {"target_modules": "all-linear"}])
@pytest.mark.parametrize("where", ["everywhere", "in one element"])
def test_weights_stored_with_different_values_are_not_tied_and_the_config_no_longer_says_so(
    where: str, lora: dict[str, str] | None, loader: str, tmp_path: Path
) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        head = -weights[EMBEDDING] if where == "everywhere" else weights[EMBEDDING].clone()
        head[60, 3] += 1
        weights["lm_head.weight"] = head

    folder = edit_weights(tiny_llama(tmp_path, tied=True), change)
    stored = load_file(folder / "model.safetensors")
    spec = {"model": str(folder), "lora": lora}
    registry = llmload.create_registry(block={"streaming"} - {loader})
    plan = llmload.plan(spec, registry=registry)
    result = llmload.load(spec, registry=registry)
    model = result.model.get_base_model() if lora else result.model
    for name in ("lm_head.weight", EMBEDDING):
        assert torch.equal(model.get_parameter(name), stored[name])
    assert plan.parameters == result.report.parameters
    assert not model.config.tie_word_embeddings
    assert result.report.warnings == [
        f"model: {DIFFERENT.format(EMBEDDING)}: both are kept, and the config of the loaded model"
        " says that they are not tied. Set `tie_word_embeddings` to false in config.json."
    ]
    if not lora:
        model.save_pretrained(tmp_path / "saved")
        again = llmload.load({"model": str(tmp_path / "saved")})
        assert again.report.warnings == []
        assert torch.equal(again.model.lm_head.weight, stored["lm_head.weight"])


@pytest.mark.parametrize("loader", ["streaming", "transformers"])
@pytest.mark.parametrize("lora", [None, {"target_modules": "all-linear"}])
def test_one_of_several_ties_that_is_stored_otherwise_is_counted_apart(
    lora: dict[str, str] | None, loader: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "t5", "t5", auto_class="seq2seq_lm")
    edit_weights(folder, lambda w: w.update({"lm_head.weight": -w["shared.weight"]}))
    spec = {"model": str(folder), "auto_class": "seq2seq_lm", "lora": lora}
    registry = llmload.create_registry(block={"streaming"} - {loader})
    plan = llmload.plan(spec, registry=registry)
    result = llmload.load(spec, registry=registry)
    assert plan.parameters == result.report.parameters
    model = result.model.get_base_model() if lora else result.model
    assert torch.equal(model.lm_head.weight, -model.shared.weight)
    assert model.encoder.embed_tokens.weight is model.shared.weight
    message = f"model: {DIFFERENT.format('shared.weight')}"
    fix = "Set `tie_word_embeddings` to false in config.json"
    if IS_MODERN:
        message += f", though others are tied by it: they are not tied. {fix}, or store them alike."
    else:  # the constructor makes the others one parameter, which is no tie of the config's
        message += (
            ": both are kept, and the config of the loaded model says that they are not tied."
            f" {fix}."
        )
    assert result.report.warnings == [message]


@pytest.mark.parametrize("loader", ["streaming", "transformers"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["int8", "uint8", "int32", "int64", "bool", "complex64"])
def test_a_weight_stored_as_no_float_is_refused_whichever_loader_would_cast_it(
    stored: str, dtype: str, loader: str, tmp_path: Path
) -> None:
    kind = getattr(torch, stored)
    folder = edit_weights(
        tiny_llama(tmp_path), lambda w: w.update({EMBEDDING: w[EMBEDDING].mul(100).to(kind)})
    )
    registry = llmload.create_registry(block={"streaming"} - {loader})
    with pytest.raises(llmload.RequestError) as caught:
        llmload.load({"model": str(folder), "dtype": dtype}, registry=registry)
    assert str(caught.value).startswith(f"{EMBEDDING}: the checkpoint has {stored} (128, 16)")


def test_so_it_is_where_this_transformers_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = edit_weights(tiny_llama(tmp_path), lambda w: w.update({EMBEDDING: w[EMBEDDING].int()}))
    monkeypatch.setattr(installed_transformers(), "unsuited", lambda: "a function differs")
    with pytest.raises(llmload.PlanError) as caught:
        llmload.load({"model": str(folder)})
    assert str(caught.value) == (
        f"{EMBEDDING}: the checkpoint has int32 (128, 16), the model takes float32 (128, 16). Check"
        " that config.json and weights belong together."
    )


def test_modules_that_stay_in_float32_do(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "t5", "t5", auto_class="seq2seq_lm")
    result = load(folder, auto_class="seq2seq_lm", dtype="float16")
    dtypes = {name: p.dtype for name, p in result.model.named_parameters()}
    assert dtypes["decoder.block.0.layer.2.DenseReluDense.wo.weight"] == torch.float32
    assert dtypes["decoder.block.0.layer.2.DenseReluDense.wi.weight"] == torch.float16
    assert facts(result)["mapped"] > 0
    assert result.plan.parameter_bytes == result.report.parameter_bytes


def test_modules_that_would_stay_in_float32_are_drawn_or_cast_as_asked(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "t5", "t5", auto_class="seq2seq_lm")
    for keys in ({"weights": "random"}, {"cast": {"modules": {r"\.wo$": "bfloat16"}}}):
        result = load(folder, auto_class="seq2seq_lm", dtype="float16", **keys)
        wo = result.model.get_parameter("decoder.block.0.layer.2.DenseReluDense.wo.weight")
        assert wo.dtype == (torch.float16 if "weights" in keys else torch.bfloat16)
        assert result.plan.parameter_bytes == result.report.parameter_bytes


def test_a_parameter_that_its_class_freezes_stays_frozen(tmp_path: Path) -> None:
    built = architectures.build("seq2seq_lm", "marian")
    frozen = [name for name, p in built.named_parameters() if not p.requires_grad]
    assert frozen == [
        "model.encoder.embed_positions.weight",
        "model.decoder.embed_positions.weight",
    ]
    built.save_pretrained(tmp_path)
    result = llmload.load({"model": str(tmp_path), "auto_class": "seq2seq_lm"})
    assert result.plan.frozen == frozen
    assert [n for n, p in result.model.named_parameters() if not p.requires_grad] == frozen


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_parts_of_a_config_have_the_dtype_that_from_pretrained_gives_them(
    tmp_path: Path, dtype: str
) -> None:
    folder = save_checkpoint(architectures.build("causal_lm", "mpt").bfloat16(), tmp_path / "mpt")
    theirs = from_pretrained(AutoModelForCausalLM, folder, dtype)
    assert differences(load(folder, dtype=dtype).model, theirs) == []


def test_the_model_is_in_eval_mode_under_its_own_name_with_its_generation_config(
    tmp_path: Path,
) -> None:
    folder = tiny_llama(tmp_path)
    GenerationConfig(max_new_tokens=3, eos_token_id=2).save_pretrained(folder)
    model = load(folder).model
    assert not any(module.training for module in model.modules())
    assert model.name_or_path == str(folder)
    assert model.generation_config.max_new_tokens == 3


def test_a_model_class_of_ones_own_is_filled(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    result = load(folder, auto_class="own_model:OwnLlama")
    facts(result)
    assert type(result.model).__name__ == "OwnLlama"
    theirs = from_pretrained(type(result.model), folder)
    assert differences(result.model, theirs) == []


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_a_device_map_onto_the_cpu_gives_what_from_pretrained_gives(
    device_map: Any, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path)
    result = load(folder, device_map=device_map, dtype="bfloat16")
    facts(result)
    theirs = from_pretrained(AutoModelForCausalLM, folder, device_map=device_map, dtype="bfloat16")
    assert differences(result.model, theirs) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device_map", ["cuda:0", "auto", {"model": 0, "lm_head": "cpu"}])
def test_a_device_map_onto_a_gpu_gives_what_from_pretrained_gives(
    device_map: Any, dtype: str, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path)
    result = load(folder, device_map=device_map, dtype=dtype)
    facts(result)
    theirs = from_pretrained(AutoModelForCausalLM, folder, device_map=device_map, dtype=dtype)
    assert differences(result.model, theirs) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("on_gpu", ["20KB", "60KB", "1GB"])
def test_max_memory_spreads_over_a_gpu_as_from_pretrained_does(on_gpu: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    result = load(folder, device_map="auto", max_memory={"0": on_gpu, "cpu": "1GB"})
    facts(result)
    most = {0: on_gpu, "cpu": "1GB"}
    theirs = from_pretrained(AutoModelForCausalLM, folder, device_map="auto", max_memory=most)
    assert result.plan.device_map == getattr(theirs, "hf_device_map", {"": 0})
    assert differences(result.model, theirs) == []


@pytest.mark.skipif(not hasattr(torch, "accelerator"), reason="torch 2.5 opens no pickle")
def test_an_allowed_pickle_is_streamed_too(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    folder = save_checkpoint(model, tmp_path / "bin")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    result = load(folder, allow_pickle=True)
    facts(result)
    assert differences(result.model, from_pretrained(AutoModelForCausalLM, folder)) == []


# --- proof ------------------------------------------------------------------------------------


def test_digests_are_recorded_only_when_asked_for(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, dtype=torch.bfloat16)
    assert "sha256" not in facts(load(folder))
    held = load_file(folder / "model.safetensors")
    for dtype in ("bfloat16", "float32"):
        result = load(folder, streaming={"digests": True}, dtype=dtype)
        placed = result.model.state_dict()
        assert facts(result)["sha256"] == {
            name: {"read": sha256(held[name]), "placed": sha256(placed[name])} for name in placed
        }


class Corrupting(Plain):
    def place(self, target: Target, source: Source) -> torch.Tensor:
        value = source.whole().clone()
        if target.name == "model.norm.weight":
            value.view(torch.uint8)[0] ^= 1
        return value


def test_a_weight_placed_with_other_bytes_than_were_read_fails_the_load(tmp_path: Path) -> None:
    with pytest.raises(llmload.LoadFailedError) as caught:
        load(tiny_llama(tmp_path), with_placement(Corrupting()), streaming={"digests": True})
    assert str(caught.value) == (
        "'model.norm.weight' was placed with other bytes than were read from the checkpoint. "
        "The memory of this machine or the placement plugin is at fault; load again."
    )


class ChangesTheFile(Plain):
    """Somebody rewrites the weights while they are read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def place(self, target: Target, source: Source) -> torch.Tensor:
        self.path.write_bytes(b"")
        return torch.zeros(source.shape)


@pytest.mark.refused_late
def test_a_file_cut_off_while_it_is_read_is_an_error_not_a_crash(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    path = folder / "model.safetensors"
    assert refusal(folder, with_placement(ChangesTheFile(path))) == (
        f"{path}: the file changed while it was being loaded. "
        "Load again when nothing writes to the folder."
    )


# --- declining --------------------------------------------------------------------------------


def declined(folder: Path, registry: Any = None, /, **keys: Any) -> str:
    result = load(folder, registry, **keys)
    assert result.report.loader == "transformers"
    return result.report.declined["streaming"]


def test_random_weights_are_not_for_us(tmp_path: Path) -> None:
    reason = declined(tiny_llama(tmp_path), weights="random")
    assert reason == "weights: random reads no checkpoint"


def test_a_changed_private_function_of_transformers_is_a_reason_to_decline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama(tmp_path)
    changed = {"modeling_utils:PreTrainedModel.tie_weights": "self more"}
    line, version = ("v5", "5.23") if IS_MODERN else ("v4_51", "4.51")
    relied_on = f"llmload.hf.{line}.relied_on._SIGNATURES"
    monkeypatch.setattr(relied_on, changed)
    assert declined(folder) == (
        "PreTrainedModel.tie_weights of this transformers takes other arguments than that of "
        f"{version}"
    )
    monkeypatch.setattr(relied_on, {"modeling_utils:gone": ""})
    assert declined(folder) == "this transformers has no gone"


def why_not(folder: Path, **keys: Any) -> str:
    return llmload.plan({"model": str(folder), **keys}).declined["streaming"]


def test_what_only_from_pretrained_carries_out_is_left_to_it(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    before = (folder / "config.json").read_text()
    for key, value in (("fusion_config", {}), ("transformers_weights", "model.safetensors")):
        edit_config(folder, **{key: value})
        expected = f"the config sets {key}, which only from_pretrained carries out"
        assert why_not(folder) == expected
        (folder / "config.json").write_text(before)
    edit_config(folder, quantization_config={"quant_method": "fp8"})
    assert why_not(folder) == "the checkpoint is quantised already"


def test_tensors_that_torch_or_the_model_cannot_take_are_left_to_from_pretrained(
    tmp_path: Path,
) -> None:
    folder = edit_weights(
        tiny_llama(tmp_path), lambda w: w.update({"model.norm._extra_state": torch.ones(2)})
    )
    assert why_not(folder) == (
        "'model.norm._extra_state' is a module's extra state, not a tensor of the model"
    )
    write(
        folder / "model.safetensors",
        {"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}},
        2,
    )
    assert why_not(folder) == "'w' is stored as F4, for which torch has no dtype"


def test_a_model_type_with_weights_in_further_files_is_left_to_from_pretrained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaConfig, "extra_files", ("head.safetensors",), raising=False)
    assert why_not(tiny_llama(tmp_path)) == "this model type keeps weights in further files"


@pytest.mark.refused_late
def test_memory_that_is_gone_since_the_plan_is_refused_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = iter([{"": "cpu"}, {"model": "cpu", "lm_head": "disk"}])  # of the plan, of the load
    monkeypatch.setattr(
        installed_transformers(), "resolve_device_map", lambda *asked, **options: next(maps)
    )
    assert refusal(tiny_llama(tmp_path), device_map="auto") == (
        "device_map: 'auto' leaves modules without a device: there is less memory now than when the"
        " plan was made. Free some of it, and load again."
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are devices here")
@pytest.mark.parametrize(
    ("device_map", "where", "device", "kind"),
    [
        ("cuda:0", "device_map", "'cuda:0'", "cuda"),
        ("npu:0", "device_map", "'npu:0'", "npu"),
        ("xpu", "device_map", "'xpu'", "xpu"),
        (0, "device_map", "0", "accelerator"),
        ({"model": "cpu", "lm_head": "cuda:1"}, "device_map.lm_head", "'cuda:1'", "cuda"),
    ],
)
def test_a_device_that_is_not_there_is_refused_by_the_plan(
    device_map: Any, where: str, device: str, kind: str, tmp_path: Path
) -> None:
    assert refusal(tiny_llama(tmp_path), device_map=device_map) == (
        f"{where}: there is no device {device}: of kind {kind!r} there are none here. Name one that"
        " is here, or remove `device_map` for the CPU."
    )


@pytest.mark.skipif(not IS_MODERN, reason="4.51.3 converts nothing")
@pytest.mark.parametrize("loader", ["streaming", "transformers"])
def test_experts_that_cannot_be_merged_are_refused_by_the_plan(loader: str, tmp_path: Path) -> None:
    folder = save_checkpoint(architectures.build("causal_lm", "mixtral"), tmp_path / "mixtral")
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    edit_weights(folder, lambda w: w.update({name: torch.ones(3)}))
    block = [] if loader == "streaming" else ["streaming"]
    plan = llmload.plan({"model": str(folder)}, registry=llmload.create_registry(block=block))
    assert [problem.where for problem in plan.errors] == ["model.layers.0.mlp.experts.down_proj"]
    assert str(plan.errors[0]).startswith(
        "model.layers.0.mlp.experts.down_proj: transformers cannot make it of the checkpoint's"
        " tensors: MergeModulelist on tensors destined for "
    )
    assert str(plan.errors[0]).endswith("Check that config.json and weights belong together.")


def test_options_for_from_pretrained_are_left_to_it(tmp_path: Path) -> None:
    class Options:
        name = "options"

        @llmload.hookimpl
        def init_context(self, ctx: llmload.LoadContext) -> None:
            ctx.load_options["offload_buffers"] = True

    registry = llmload.create_registry(plugins=[Options()])
    assert declined(tiny_llama(tmp_path), registry) == (
        "a plugin set offload_buffers, for from_pretrained to do"
    )


@pytest.mark.skipif(not IS_MODERN, reason="4.51.3 shows no such bar")
def test_only_the_load_itself_shows_a_progress_bar(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", True)
    folder = tiny_llama(tmp_path)
    capfd.readouterr()
    load(folder)
    assert capfd.readouterr().err.count("Loading weights: 100%") == 1


def imported_after(code: str) -> set[str]:
    """Run ``code`` in a process of its own; return the libraries of plugins that it imported."""
    libraries = {"bitsandbytes", "colossalai", "deepspeed", "peft"}
    listing = f"{code}\nimport sys\nprint(*({libraries!r} & sys.modules.keys()))"
    command = [sys.executable, "-c", listing]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_a_plain_load_imports_no_library_of_a_plugin_that_takes_no_part(tmp_path: Path) -> None:
    folder = str(tiny_llama(tmp_path))
    ours = imported_after(f"import llmload\nllmload.load({{'model': {folder!r}}})")
    theirs = imported_after(
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({folder!r})"
    )
    assert ours <= theirs
    assert not ours or not IS_MODERN  # where transformers imports DeepSpeed


def test_a_place_for_a_module_that_is_not_there_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    llmload.load({"model": str(folder), "device_map": {"model": "cpu", "lm_head": "cpu"}})
    with pytest.raises(llmload.RequestError) as caught:
        llmload.load({"model": str(folder), "device_map": {"model": "cpu", "lm_haed": "cpu"}})
    assert str(caught.value) == (
        "device_map.lm_haed: no module of LlamaForCausalLM is called 'lm_haed'. The nearest:"
        " lm_head."
    )


# --- memory of its own -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_in_memory_of_their_own_are_those_on_pages_and_do_not_follow_the_file(
    tmp_path: Path, dtype: str
) -> None:
    folder = tiny_llama(tmp_path)
    spec = {"model": str(folder), "dtype": dtype}
    mapped = {name: p.clone() for name, p in llmload.load(spec).model.named_parameters()}
    own = llmload.load(spec | {"streaming": {"mapped": False}})
    assert own.report.facts["streaming"]["mapped"] == 0
    file = folder / "model.safetensors"
    with file.open("r+b") as overwritten:  # as `cp` and `rsync --inplace` do
        overwritten.write(bytes(file.stat().st_size))
    os.truncate(file, 0)
    for name, parameter in own.model.named_parameters():
        assert torch.equal(parameter, mapped[name]), name
    own.model(torch.arange(8)[None])


def test_memory_of_their_own_is_refused_where_from_pretrained_loads(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    edit_config(folder, fusion_config={})
    spec = {"model": str(folder), "streaming": {"mapped": False}}
    assert [str(problem) for problem in llmload.plan(spec).errors] == [
        "streaming.mapped: from_pretrained loads this model, and leaves weights on the pages of"
        " their files: the config sets fusion_config, which only from_pretrained carries out."
        " Remove `mapped: false`, or copy the folder to where nobody writes."
    ]


def test_members_with_memory_of_their_own_share_none(tmp_path: Path) -> None:
    spec = {"model": str(tiny_llama(tmp_path)), "streaming": {"mapped": False}}
    members = {"policy": spec, "reference": {"like": "policy", "trainable": False}}
    group = llmload.load_group({"models": members})
    assert group.plan.shared == group.report.shared == []
    members["policy"] = {"model": spec["model"]}
    assert llmload.plan_group({"models": members}).shared != []


@pytest.mark.parametrize("change", ["overwrite", "put back", "truncate", "replace", "remove"])
def test_the_result_says_whether_its_files_changed(tmp_path: Path, change: str) -> None:
    folder = tiny_llama(tmp_path)
    result = llmload.load({"model": str(folder), "streaming": {"mapped": False}})
    result.check_files()
    file = folder / "model.safetensors"
    before = file.stat()
    if change in ("overwrite", "put back"):
        with file.open("r+b") as written:
            written.seek(-4, os.SEEK_END)
            written.write(b"abcd")
    if change == "put back":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    if change == "truncate":
        os.truncate(file, 100)
    if change == "replace":
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
    if change == "remove":
        file.unlink()
    with pytest.raises(llmload.CheckpointError) as caught:
        result.check_files()
    assert str(caught.value) == (
        f"{file.resolve()}: the file changed since the model was loaded from it, and weights that"
        " needed no cast may have changed with it. Load again, from a folder that nothing writes"
        " to."
    )


def test_saving_over_the_folder_that_was_loaded_from_keeps_the_model_and_the_files(
    tmp_path: Path,
) -> None:
    folder = tiny_llama(tmp_path)
    model = llmload.load({"model": str(folder)}).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(folder)
    again = llmload.load({"model": str(folder)}).model.state_dict()
    for name, value in expected.items():
        assert torch.equal(model.state_dict()[name], value), name
        assert torch.equal(again[name], value), name
