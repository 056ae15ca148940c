"""examples/coati_sft.yaml loads the actor that stage 1 of old Coati trains.

What its scripts do is written down here from ColossalAI v0.3.4, applications/Chat. Stages 2 and 3
need the distribution llmload-rlhf and are tested there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import recipe, stored
from sameness import differences
from stacks import needs_safe_pickles
from torch import nn
from transformers import AutoTokenizer, GPT2LMHeadModel

import llmload
from llmload.hf import installed_transformers
from llmload.testing import SENTENCES, parameters, same, tiny_checkpoint, trainable

MODEL = "openai-community/gpt2"


class Actor(nn.Module):
    """Coati's wrapper of a causal model: from the folder, then cast as a whole."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        options = installed_transformers().dtype_option(torch.float32)
        self.model = GPT2LMHeadModel.from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("coati") / "gpt2", "gpt2")


@pytest.fixture(scope="module")
def result(folder: Path) -> llmload.LoadResult:
    return llmload.load(recipe("coati_sft", {MODEL: folder}))


def test_the_model_is_the_one_inside_coatis_actor(result: llmload.LoadResult, folder: Path) -> None:
    theirs: Any = Actor(folder).to(torch.bfloat16).model
    # A cast of modules is no matter for the config, nor does Coati say there what pads.
    (dtype,) = installed_transformers().dtype_option(torch.bfloat16)
    setattr(theirs.config, dtype, torch.bfloat16)
    for config in (theirs.config, theirs.generation_config):
        config.pad_token_id = 2
    assert differences(result.model, theirs) == []
    held = parameters(result.model)
    for name, tensor in stored(folder).items():
        assert same(held[name], tensor.to(torch.bfloat16)), name
    assert trainable(result.model) == set(held)


@needs_safe_pickles
def test_what_coati_saves_of_a_trained_actor_is_loaded_again(
    result: llmload.LoadResult, folder: Path, tmp_path: Path
) -> None:
    """Its save_pretrained leaves a pickle whose keys have lost their first ``model.``."""
    actor = Actor(folder).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(1)
    actor.model.config.save_pretrained(tmp_path)
    state = {key.replace("model.", "", 1): value for key, value in actor.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)

    again = llmload.load(recipe("coati_sft", {MODEL: tmp_path}) | {"allow_pickle": True}).model
    for name, parameter in parameters(again).items():
        assert same(parameter, parameters(actor.model)[name]), name


def test_the_tokenizer_pads_with_eos_on_the_right(result: llmload.LoadResult, folder: Path) -> None:
    plain = AutoTokenizer.from_pretrained(folder)
    plain.pad_token = plain.eos_token
    texts = list(SENTENCES)
    assert result.tokenizer(texts, padding=True).data == plain(texts, padding=True).data
    assert result.tokenizer.pad_token_id == 2
