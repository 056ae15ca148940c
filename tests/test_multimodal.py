"""Models of images and text, loaded as what they are, and adapted in their language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sameness import differences, from_pretrained
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

import llmload
from llmload.testing import save_checkpoint

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
