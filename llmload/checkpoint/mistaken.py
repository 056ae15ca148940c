"""What a folder is that was given for a model's and is none, and what to write instead."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

DEFAULT_FIX: Final = "Give a folder written by save_pretrained."
_CACHE: Final = re.compile(r"models--([^/]+)")
_BESIDE: Final = ", beside `model` for config and tokenizer"
_STEP: Final = re.compile(r"checkpoint-(\d+)")


def without_config(folder: Path) -> tuple[str, str]:
    """Return what to say of a folder that holds no config.json: what it is, and the way out."""
    found = _entries(folder)
    hub_id = _hub_id(folder)
    if "adapter_config.json" in found:
        base = _base_of(folder / "adapter_config.json")
        return (
            "and is an adapter of PEFT, not a model",
            f"Write `model: {base or 'BASE'}` and `lora: {{adapter: {folder}}}`.",
        )
    if hub_id and folder.parent.name == "snapshots":
        return (
            f"and is a snapshot of {hub_id!r} of which not everything was downloaded",
            f"Fetch the rest with `hf download {hub_id}`.",
        )
    if hub_id and "snapshots" in found:
        return f"and is the hub's cache of {hub_id!r}", f"Write `model: {hub_id}`."
    if any(name.endswith((".incomplete", ".part")) for name in found):
        return "and a download into it has not ended", "Download the folder again."
    steps = sorted((int(m[1]), m[0]) for name in found if (m := _STEP.fullmatch(name)))
    if steps:
        last = folder / steps[-1][1]
        fix = f"Name one of its checkpoints, of which the last is {last}."
        if (last / "adapter_config.json").exists():
            base = _base_of(last / "adapter_config.json")
            fix = f"Write `model: {base or 'BASE'}` and `lora: {{adapter: {last}}}`, the last one."
        return "and is the output folder of a Trainer", fix
    if "model_index.json" in found:
        return "and is a pipeline of diffusers", "Name the folder of one of its models."
    if "zero_to_fp32.py" in found:
        return "and is a checkpoint of DeepSpeed, in parts", _joined_by_deepspeed(folder, _BESIDE)
    if any(name.endswith(".distcp") for name in found):
        return (
            "and is a distributed checkpoint of torch, in parts",
            f"Join them with `accelerate merge-weights {folder} OUT`, and write `weights_from:"
            f" OUT`{_BESIDE}.",
        )
    foreign = _foreign(found)
    if foreign is not None:
        return foreign
    inner = [name for name in sorted(found) if (folder / name / "config.json").exists()]
    if inner:
        return (
            f"but its folders {', '.join(inner[:3])} do"
            if inner[1:]
            else f"but {inner[0]} in it does",
            f"Write `subfolder: {inner[0]}`.",
        )
    return "", DEFAULT_FIX


def without_weights(folder: Path) -> str:
    """Return the way out for a folder that holds a config and no weights by their usual names."""
    found = _entries(folder)
    hub_id = _hub_id(folder)
    if hub_id:
        return f"Fetch the weights with `hf download {hub_id}`."
    if "zero_to_fp32.py" in found:
        return f"These are DeepSpeed's partitions. {_joined_by_deepspeed(folder)}"
    sharded = sorted(name for name in found if name.startswith("pytorch_model_fsdp"))
    if sharded:
        return (
            f"These are FSDP's shards: join them with `accelerate merge-weights"
            f" {folder / sharded[0]} OUT`, and write `weights_from: OUT`."
        )
    if {"adapter_model.safetensors", "adapter_model.bin"} & found:
        return (
            f"For the adapter in it write `lora: {{adapter: {folder}}}`, with its base as `model`."
        )
    foreign = _foreign(found)
    if foreign is not None:
        return foreign[1]
    others = sorted(
        name for name in found if name.endswith((".safetensors", ".safetensors.index.json"))
    )
    if others:
        return f"Name the file of weights: `weights_from: {folder / others[0]}`."
    return f"{DEFAULT_FIX[:-1]}, or name where the weights are in `weights_from`."


def _joined_by_deepspeed(folder: Path, beside: str = "") -> str:
    return (
        f"Join them with `python -m deepspeed.utils.zero_to_fp32 {folder} OUT"
        f" --safe_serialization`, and write `weights_from: OUT`{beside}."
    )


def _foreign(found: set[str]) -> tuple[str, str] | None:
    """Return what it is, and the way out, where the weights are in a format of others."""
    if any(name.endswith(".gguf") for name in found):
        return (
            "and holds weights for llama.cpp",
            "Weights in GGUF are not read: load the repository that they were made of.",
        )
    if "params.json" in found or any(name.startswith("consolidated.") for name in found):
        return (
            "and holds weights as their makers trained them",
            "Convert them with the script of transformers for this model type, or load the"
            " repository that holds them as transformers reads them.",
        )
    if {"tf_model.h5", "flax_model.msgpack"} & found:
        return (
            "and holds weights of TensorFlow or Flax",
            "Convert them with a transformers that still reads them (4.x), `from_tf=True` or"
            " `from_flax=True`.",
        )
    for ending, what, kind in (
        (".onnx", "a graph for ONNX Runtime", "ONNX"),
        (".npz", "weights of MLX", "MLX"),
    ):
        if any(name.endswith(ending) for name in found):
            return (
                f"and holds {what}",
                f"Weights of {kind} are not read: load the repository that they were made of.",
            )
    return None


def _entries(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except OSError:
        return set()


def _hub_id(folder: Path) -> str:
    """Return the id of the hub repository that a folder in the cache is of."""
    for part in (folder.name, *(parent.name for parent in list(folder.parents)[:2])):
        if match := _CACHE.fullmatch(part):
            return match[1].replace("--", "/", 1)
    return ""


def _base_of(config: Path) -> str:
    """Return the base model that an adapter's config names."""
    try:
        with config.open("rb") as file:
            content = json.loads(file.read(2**20))
    except (OSError, ValueError, RecursionError):
        return ""
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return base if isinstance(base, str) and base.isprintable() and len(base) < 200 else ""
