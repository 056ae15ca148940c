"""A folder that holds a model and an adapter: the spec says what becomes of the adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import load, refusal, save

import llmload
from llmload.testing import IDS, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and beside its weights an adapter that changes what it says."""
    folder = tiny_llama(tmp_path_factory.mktemp("beside"))
    model = load(folder, {"r": 4, "target_modules": ["q_proj", "v_proj"]}).model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator)
    adapter = save(model, folder.parent / "adapter")
    for file in adapter.iterdir():
        if file.name.startswith("adapter_"):
            shutil.copy(file, folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


LOADERS = pytest.mark.parametrize("block", [(), ("streaming",)], ids=["streaming", "transformers"])


@LOADERS
@pytest.mark.parametrize("keys", [{}, {"trainable": False}, {"lora": {"r": 2}}], ids=str)
def test_a_spec_that_does_not_speak_of_the_adapter_is_refused(
    folder: Path, keys: dict[str, Any], block: tuple[str, ...]
) -> None:
    registry = llmload.create_registry(block=block)
    with pytest.raises(llmload.RequestError) as caught:
        llmload.load({"model": str(folder), **keys}, registry=registry)
    assert str(caught.value) == (
        f"ignore_adapter: the folder {str(folder)!r} holds an adapter beside the model's weights,"
        f" and the spec does not say what becomes of it. Write `lora: {{adapter: {folder}}}` to"
        " resume it, with `merge: true` to merge it, or `ignore_adapter: true` to leave it out."
    )


@LOADERS
def test_the_adapter_is_resumed_merged_or_left_out(folder: Path, block: tuple[str, ...]) -> None:
    registry = llmload.create_registry(block=block)

    def loaded(**keys: Any) -> llmload.LoadResult:
        result = llmload.load({"model": str(folder), **keys}, registry=registry)
        assert result.report.loader == ("transformers" if block else "streaming")
        assert result.plan.parameters == result.report.parameters
        assert result.plan.trainable == result.report.trainable
        return result

    resumed = loaded(lora={"adapter": str(folder)})
    merged = loaded(lora={"adapter": f"{folder}/../{folder.name}", "merge": True})
    ignored = loaded(ignore_adapter=True)
    new = loaded(ignore_adapter=True, lora={"r": 2, "target_modules": ["q_proj"]})

    with torch.no_grad(), resumed.model.disable_adapter():
        plain = logits(resumed.model)
    expected = logits(resumed.model)
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(logits(merged.model), expected, atol=1e-5, rtol=0)
    assert torch.equal(logits(ignored.model), plain)
    assert torch.equal(logits(new.model), plain)
    assert not [name for name, _ in ignored.model.named_parameters() if "lora_" in name]
    assert len([name for name, _ in resumed.model.named_parameters() if "lora_" in name]) == 8
    assert ignored.report.left_out == {"adapter_config.json": "the spec ignores the adapter"}
    notes = [note for step in ignored.plan.steps for note in step.notes]
    assert "leave out the adapter that lies beside the weights" in notes


def test_an_adapter_cannot_be_both_resumed_and_left_out(folder: Path) -> None:
    assert refusal(folder, {"adapter": str(folder)}, ignore_adapter=True) == (
        f"ignore_adapter: the adapter in {str(folder)!r} is to be left out, and it is named as the"
        " one to resume. Remove `ignore_adapter`, or `adapter`."
    )


def test_an_adapter_from_elsewhere_says_nothing_of_the_one_beside(folder: Path) -> None:
    other = str(folder.parent / "adapter")
    assert refusal(folder, {"adapter": other}).startswith("ignore_adapter: the folder")
    load(folder, {"adapter": other}, ignore_adapter=True)


def test_weights_that_are_not_read_have_no_adapter_beside_them(
    folder: Path, tmp_path: Path
) -> None:
    llmload.load({"model": str(folder), "weights": "random"})
    elsewhere = tiny_llama(tmp_path, seed=3)
    result = llmload.load({"model": str(folder), "weights_from": str(elsewhere)})
    assert not [name for name, _ in result.model.named_parameters() if "lora_" in name]
    with pytest.raises(llmload.RequestError, match="holds an adapter beside"):
        llmload.load({"model": str(elsewhere), "weights_from": str(folder)})
