"""Folders that people give for a model's: each is called what it is, with what to write instead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import llmload
from llmload.checkpoint import mistaken
from llmload.testing import tiny_llama

ADAPTER = {"base_model_name_or_path": "org/base"}


def make(root: Path, *entries: str) -> Path:
    """Make a folder with empty files, or folders where a name ends with a slash."""
    for entry in entries:
        path = root / entry
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if entry.endswith("/") else path.write_text("{}")
    return root


def refusal(folder: Path) -> str:
    with pytest.raises(llmload.CheckpointError) as caught:
        llmload.plan({"model": str(folder)})
    return str(caught.value)


NO_CONFIG = {
    "a Trainer's output": (
        ["checkpoint-9/config.json", "checkpoint-10/config.json", "trainer_state.json"],
        ", and is the output folder of a Trainer. Name one of its checkpoints, of which the last is"
        " {folder}/checkpoint-10.",
    ),
    "a Trainer's output with adapters": (
        ["checkpoint-2/adapter_config.json"],
        ", and is the output folder of a Trainer. Write `model: BASE` and `lora: {{adapter:"
        " {folder}/checkpoint-2}}`, the last one.",
    ),
    "a download": (
        ["model.safetensors.incomplete", "tokenizer.json"],
        ", and a download into it has not ended. Download the folder again.",
    ),
    "a pipeline": (
        ["model_index.json", "text_encoder/config.json"],
        ", and is a pipeline of diffusers. Name the folder of one of its models.",
    ),
    "llama.cpp's": (
        ["model.Q4_K_M.gguf"],
        ", and holds weights for llama.cpp. Weights in GGUF are not read: load the repository that"
        " they were made of.",
    ),
    "Meta's": (
        ["params.json", "consolidated.00.pth"],
        ", and holds weights as their makers trained them. Convert them with the script of"
        " transformers for this model type, or load the repository that holds them as transformers"
        " reads them.",
    ),
    "DeepSpeed's": (
        ["global_step10/", "zero_to_fp32.py", "latest"],
        ", and is a checkpoint of DeepSpeed, in parts. Join them with `python -m"
        " deepspeed.utils.zero_to_fp32 {folder} OUT --safe_serialization`, and write `weights_from:"
        " OUT`, beside `model` for config and tokenizer.",
    ),
    "FSDP's": (
        [".metadata", "__0_0.distcp"],
        ", and is a distributed checkpoint of torch, in parts. Join them with `accelerate"
        " merge-weights {folder} OUT`, and write `weights_from: OUT`, beside `model` for config and"
        " tokenizer.",
    ),
    "ONNX Runtime's": (
        ["model.onnx"],
        ", and holds a graph for ONNX Runtime. Weights of ONNX are not read: load the repository"
        " that they were made of.",
    ),
    "MLX's": (
        ["weights.npz"],
        ", and holds weights of MLX. Weights of MLX are not read: load the repository that they"
        " were made of.",
    ),
    "the folder above": (
        ["actor/config.json"],
        ", but actor in it does. Write `subfolder: actor`.",
    ),
    "the folder above several": (
        ["actor/config.json", "critic/config.json"],
        ", but its folders actor, critic do. Write `subfolder: actor`.",
    ),
    "something else": (["notes.txt"], ". Give a folder written by save_pretrained."),
}


@pytest.mark.parametrize("kind", NO_CONFIG)
def test_a_folder_without_a_config_is_called_what_it_is(kind: str, tmp_path: Path) -> None:
    entries, answer = NO_CONFIG[kind]
    folder = make(tmp_path / "given", *entries)
    assert refusal(folder) == (
        f"model: the folder {str(folder)!r} holds no config.json" + answer.format(folder=folder)
    )


def test_an_adapter_is_answered_with_its_base(tmp_path: Path) -> None:
    folder = make(tmp_path / "given", "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    assert refusal(folder) == (
        f"model: the folder {str(folder)!r} holds no config.json, and is an adapter of PEFT, not a"
        f" model. Write `model: org/base` and `lora: {{adapter: {folder}}}`."
    )
    for damaged in ("[]", "oops", '{"base_model_name_or_path": 7}', "[" * 100_000):
        (folder / "adapter_config.json").write_text(damaged)
        assert "Write `model: BASE`" in mistaken.without_config(folder)[1]


def test_the_hubs_cache_is_answered_with_the_id(tmp_path: Path) -> None:
    cache = make(tmp_path / "models--org--name", "snapshots/0a1b/tokenizer.json", "refs/main")
    assert refusal(cache).endswith(
        ", and is the hub's cache of 'org/name'. Write `model: org/name`."
    )
    assert refusal(cache / "snapshots" / "0a1b").endswith(
        ", and is a snapshot of 'org/name' of which not everything was downloaded. Fetch the rest"
        " with `hf download org/name`."
    )


NO_WEIGHTS = {
    "DeepSpeed's": (
        ["global_step10/", "zero_to_fp32.py", "latest"],
        "These are DeepSpeed's partitions. Join them with `python -m deepspeed.utils.zero_to_fp32"
        " {folder} OUT --safe_serialization`, and write `weights_from: OUT`.",
    ),
    "FSDP's": (
        ["pytorch_model_fsdp_0/"],
        "These are FSDP's shards: join them with `accelerate merge-weights"
        " {folder}/pytorch_model_fsdp_0 OUT`, and write `weights_from: OUT`.",
    ),
    "an adapter beside a config": (
        ["adapter_model.safetensors"],
        "For the adapter in it write `lora: {{adapter: {folder}}}`, with its base as `model`.",
    ),
    "another name": (
        ["weights.safetensors"],
        "Name the file of weights: `weights_from: {folder}/weights.safetensors`.",
    ),
    "Flax's": (
        ["flax_model.msgpack"],
        "Convert them with a transformers that still reads them (4.x), `from_tf=True` or"
        " `from_flax=True`.",
    ),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_a_folder_without_weights_is_answered_with_the_way_to_them(
    kind: str, tmp_path: Path
) -> None:
    entries, answer = NO_WEIGHTS[kind]
    folder = tiny_llama(tmp_path)
    (folder / "model.safetensors").unlink()
    make(folder, *entries)
    assert refusal(folder).endswith(f". {answer.format(folder=folder)}")


def test_weights_of_another_name_load_as_the_answer_says(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    shutil.move(folder / "model.safetensors", folder / "weights.safetensors")
    spec = {"model": str(folder), "weights_from": str(folder / "weights.safetensors")}
    assert llmload.plan(spec).errors == []


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tiny_llama(tmp_path) / "model.safetensors"
    assert refusal(file) == (
        f"model: {str(file)!r} is a file, and a model is a folder. Give the folder that holds"
        " config.json; name a file of weights in `weights_from`."
    )


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 135\n"


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"],
)
def test_a_git_lfs_pointer_is_called_one(name: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    (folder / name).write_text(POINTER)
    with pytest.raises(llmload.RequestError) as caught:
        llmload.load({"model": str(folder)})
    assert str(caught.value).startswith(f"{folder / name}: ")
    assert str(caught.value).endswith(
        "a Git LFS pointer lies where the file should be. Fetch the files first, for example with"
        " git lfs pull."
    )
