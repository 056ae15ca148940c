"""Models of images and text, loaded as what they are, and adapted in their language model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sameness import differences, from_pretrained
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import llmload
from llmload.testing import save_checkpoint, tiny_llama

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llava of two layers in each tower."""
    vision = SIZES | {"model_type": "clip_vision_model", "num_attention_heads": 2}
    text: dict[str, Any] = SIZES | {"model_type": "llama", "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=vision | {"image_size": 8, "patch_size": 4, "projection_dim": 16},
        text_config=text | {"vocab_size": 128, "tie_word_embeddings": False},
        image_token_index=5,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    place = tmp_path_factory.mktemp("llava")
    return save_checkpoint(model, place)


def test_it_loads_as_from_pretrained_does(folder: Path) -> None:
    result = llmload.load({"model": str(folder), "auto_class": "image_text_to_text"})
    assert type(result.model) is LlavaForConditionalGeneration
    assert result.report.newly_initialised == {}
    assert differences(result.model, from_pretrained(AutoModelForImageTextToText, folder)) == []


def test_targets_can_stay_in_the_language_model(folder: Path) -> None:
    section = {"r": 2, "target_modules": r".*language_model.*\.(q|v)_proj"}
    spec = {"model": str(folder), "auto_class": "image_text_to_text", "lora": section}
    targets = llmload.load(spec).plan.facts["lora"]["targets"]
    assert len(targets) == 4
    assert all("language_model" in name for name in targets)


@pytest.fixture(scope="module")
def processed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tokenizer and a processor."""
    place = tmp_path_factory.mktemp("processed")
    shutil.copytree(folder, place, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama(place / "text"))
    shutil.rmtree(place / "text")
    size = {"height": 8, "width": 8}
    images = CLIPImageProcessor(size=size, crop_size=size)
    options = {"patch_size": 4, "vision_feature_select_strategy": "default"}
    LlavaProcessor(images, tokenizer, image_token="<unk>", **options).save_pretrained(place)
    return place


def spec(folder: Path, **keys: Any) -> dict[str, Any]:
    return {"model": str(folder), "auto_class": "image_text_to_text", **keys}


def test_the_processor_comes_along_around_the_tokenizer_of_the_spec(processed: Path) -> None:
    template = "{{ messages }}"
    section = {"add_tokens": ["<a>"], "pad_token": "eos", "chat_template": template}
    keys = {
        "tokenizer": section,
        "embeddings": {},
        "lora": {"r": 2, "target_modules": "all-linear"},
    }
    result = llmload.load(spec(processed, **keys))
    processor: Any = result.processor
    assert type(processor) is LlavaProcessor
    assert processor.tokenizer is result.tokenizer
    assert processor.chat_template == template
    assert processor.image_processor.crop_size["height"] == 8
    made = processor(text="<a>", return_tensors="pt")["input_ids"]
    assert made[0, -1] == result.tokenizer.convert_tokens_to_ids("<a>")
    notes = [note for step in result.plan.steps for note in step.notes]
    assert "LlavaProcessor around it" in notes


def test_images_and_text_go_through_processor_and_model(processed: Path) -> None:
    result = llmload.load(spec(processed))
    processor: Any = result.processor
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    inputs = processor(images=image, text="<unk> a", return_tensors="pt")
    ids = inputs["input_ids"]
    wanted = processor.tokenizer.convert_tokens_to_ids("<unk>")
    inputs["input_ids"] = torch.where(ids == wanted, 5, ids)  # the model's own id for an image
    with torch.no_grad():
        assert result.model(**inputs).logits.isfinite().all()


def test_text_models_and_folders_without_one_have_no_processor(
    folder: Path, processed: Path, tmp_path: Path
) -> None:
    assert llmload.load(spec(folder)).processor is None
    assert llmload.load({"model": str(tiny_llama(tmp_path))}).processor is None


def test_a_processor_that_cannot_be_loaded_is_a_warning(processed: Path, tmp_path: Path) -> None:
    place = tmp_path / "bad"
    shutil.copytree(processed, place)
    for file in place.glob("*processor_config.json"):
        file.write_text('{"processor_class": "LlavaProcessor", "image_processor_type": "None"}')
    result = llmload.load(spec(place))
    assert result.processor is None
    assert result.tokenizer is not None
    (warning,) = map(str, result.plan.warnings)
    assert warning.startswith(
        f"tokenizer: the processor in '{place}' cannot be loaded, and the model comes with its"
        " tokenizer alone: "
    )
    assert warning.endswith(" Install the package that it needs, or save the processor again.")


def test_members_of_a_group_have_the_processor_too(processed: Path) -> None:
    policy = spec(processed, lora={"r": 2, "target_modules": r".*language_model.*\.q_proj"})
    group = llmload.load_group({"models": {"policy": policy, "ref": {"adapter_of": "policy"}}})
    assert group["ref"].processor is group["policy"].processor is not None
