"""What the report says of the comparison with the checkpoint is true of the model handed out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import llmload
from llmload.hookspecs import hookimpl
from llmload.testing import tiny_llama, tiny_model

ENDS = "in the model as they are stored, by their first and last values"
LOADERS = ("streaming", "transformers")


def load(folder: Path, loader: str, **spec: Any) -> llmload.LoadResult:
    registry = llmload.create_registry(block={"streaming"} - {loader})
    return llmload.load({"model": str(folder), **spec}, registry=registry)


def said(result: llmload.LoadResult) -> str:
    (line,) = (line for line in result.report.audit if "of the checkpoint's" in line)
    return line


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_of_a_plain_model_is_counted(dtype: str, loader: str, tmp_path: Path) -> None:
    result = load(tiny_llama(tmp_path), loader, dtype=dtype)
    assert said(result) == f"21 of the checkpoint's 21 tensors are {ENDS}"
    assert result.report.compared == 21


@pytest.mark.parametrize("loader", LOADERS)
def test_keys_under_a_prefix_are_compared_too(loader: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    result = load(folder, loader, auto_class="base", strict={"allow_unexpected": ["^lm_head"]})
    assert said(result) == (
        f"20 of the checkpoint's 21 tensors are {ENDS}; 1 could not be compared, as they were"
        " converted, quantised or left out"
    )


@pytest.mark.parametrize("loader", LOADERS)
def test_an_adapter_beside_the_weights_changes_none_of_them(loader: str, tmp_path: Path) -> None:
    result = load(tiny_llama(tmp_path), loader, lora={"target_modules": "all-linear"})
    assert said(result) == f"21 of the checkpoint's 21 tensors are {ENDS}"


@pytest.mark.parametrize("loader", LOADERS)
def test_what_a_merge_has_changed_is_not_said_to_be_as_stored(loader: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    adapter = get_peft_model(
        tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapter.save_pretrained(tmp_path / "adapter")
    lora = {"adapter": str(tmp_path / "adapter"), "merge": True}
    result = load(folder, loader, lora=lora)
    assert said(result) == (
        f"19 of the checkpoint's 21 tensors are {ENDS}; 2 more were, and plugins have changed them"
        " since"
    )
    stored = load_file(folder / "model.safetensors")
    same = [n for n, p in result.model.named_parameters() if torch.equal(p, stored[n])]
    assert result.report.compared == len(same) == 19


@pytest.mark.parametrize("loader", LOADERS)
def test_resized_embeddings_are_not_said_to_be_as_stored(loader: str, tmp_path: Path) -> None:
    result = load(tiny_llama(tmp_path), loader, embeddings={"pad_to_multiple_of": 48})
    assert said(result) == (
        f"19 of the checkpoint's 21 tensors are {ENDS}; 2 more were, and plugins have changed them"
        " since"
    )


class Reverses:
    """A plugin that changes weights in place."""

    name = "reverses"
    always_active = True

    @hookimpl
    def post_load(self, ctx: llmload.LoadContext, model: torch.nn.Module) -> torch.nn.Module:
        if not ctx.rehearsing:
            model.get_parameter("lm_head.weight").data.neg_()
        return model


def test_what_a_plugin_writes_in_place_is_not_said_to_be_as_stored(tmp_path: Path) -> None:
    registry = llmload.create_registry(plugins=[Reverses()])
    result = llmload.load({"model": str(tiny_llama(tmp_path))}, registry=registry)
    assert result.report.compared == 20


def test_a_renamed_checkpoint_is_compared_under_its_new_names(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    file = folder / "model.safetensors"
    weights = {f"wrapped.{name}": value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    result = load(folder, "streaming", key_map={r"^wrapped\.": ""})
    assert result.report.compared == 21
