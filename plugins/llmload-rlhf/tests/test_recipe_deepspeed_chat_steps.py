"""examples/deepspeed_chat_reward_model.yaml and deepspeed_chat_rlhf.yaml: steps 2 and 3.

What DeepSpeed-Chat does is written down here from DeepSpeedExamples 45b4b715: its models, the files
of save_hf_format, and its rlhf_engine.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from making import alike, dtype_option, example, write
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import llmload
from llmload.testing import IDS, hold_frozen, parameters, same, tiny_checkpoint, trainable

RATES = ("dropout", "attention_dropout", "hidden_dropout", "activation_dropout")
TOKENIZER = "facebook/opt-1.3b"


def tokenizer_of(folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    return tokenizer


def create_hf_model(auto_class: Any, folder: Path, tokenizer: Any, dropout: float | None) -> Any:
    """Load in float32, its dropout in the config, its rows a multiple of eight."""
    config = AutoConfig.from_pretrained(folder)
    for rate in RATES if dropout is not None else ():
        if hasattr(config, rate):
            setattr(config, rate, dropout)
    model = auto_class.from_pretrained(folder, config=config, **dtype_option(torch.float32))
    model.config.end_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.config.eos_token_id
    model.resize_token_embeddings(8 * math.ceil(len(tokenizer) / 8.0))
    return model


class RewardModel(nn.Module):
    """DeepSpeed-Chat's: a transformer and a head without a bias."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.config = base.config
        self.v_head = nn.Linear(self.config.word_embed_proj_dim, 1, bias=False)
        self.rwtransformer = base

    def values(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.v_head(self.rwtransformer(ids, attention_mask=mask)[0]).squeeze(-1)


def save_hf_format(model: Any, folder: Path, *, misspelt: bool = False) -> Path:
    """Save a pickle and the config; of the tokenizer only a vocabulary, which is no use here."""
    folder.mkdir()
    state = model.state_dict()
    if misspelt:  # until 2023-10-08
        state = {k.replace("rwtransformer.", "rwtranrsformer."): v for k, v in state.items()}
    write(folder, state)
    model.config.to_json_file(folder / "config.json")
    return folder


def moved(model: nn.Module, seed: int) -> Any:
    """Give every parameter another value, as a training run does."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def held_to(ours: Any, theirs: nn.Module) -> None:
    mine, other = parameters(ours), dict(theirs.named_parameters(remove_duplicate=False))
    assert mine.keys() == other.keys()
    for name, parameter in mine.items():
        assert same(parameter, other[name]), name


def ids_hold(model: Any) -> None:
    config = model.config
    assert (config.end_token_id, config.pad_token_id, config.eos_token_id) == (2, 2, 2)
    assert config.vocab_size == len(model.get_input_embeddings().weight) == 56


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("deepspeed_chat") / "opt", "opt", dtype=torch.float16, pad=True
    )


# --- step 2 -------------------------------------------------------------------------------------


def test_the_reward_model_is_deepspeed_chats(base: Path) -> None:
    torch.manual_seed(7)
    result = llmload.load(example("deepspeed_chat_reward_model", {"facebook/opt-350m": base}))
    transformer = create_hf_model(AutoModel, base, tokenizer_of(base), None)
    torch.manual_seed(7)  # the resizing there draws, and ours does not
    theirs = RewardModel(transformer).eval()
    held_to(result.model, theirs)
    assert set(result.report.newly_initialised) == {"v_head.weight"}
    assert trainable(result.model) == set(parameters(result.model))
    assert (result.model.PAD_ID, result.model.num_padding_at_beginning) == (2, 1)
    assert result.model.config.dropout == 0.1
    ids_hold(result.model)
    with torch.no_grad():
        mask = torch.ones_like(IDS)
        ours = result.model.forward_value(IDS, mask, return_value_only=True)
        assert same(ours, theirs.values(IDS, mask))


# --- step 3 -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["", "misspelt"])
def steps(
    request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The trained models of steps 1 and 2, and the folders they were saved to."""
    place = tmp_path_factory.mktemp("steps")
    tokenizer = tokenizer_of(base)
    actor = moved(create_hf_model(AutoModelForCausalLM, base, tokenizer, None), 1)
    reward = moved(RewardModel(create_hf_model(AutoModel, base, tokenizer, None)), 2)
    folders = {
        "output/step1": save_hf_format(actor, place / "step1"),
        "output/step2": save_hf_format(reward, place / "step2", misspelt=request.param),
        TOKENIZER: base,
    }
    return {"actor": actor, "reward": reward, "folders": folders}


@pytest.fixture(scope="module")
def group(steps: dict[str, Any]) -> Any:
    return llmload.load_group(example("deepspeed_chat_rlhf", steps["folders"]))


def test_actor_and_reference_are_the_model_of_step_1(group: Any, steps: Any) -> None:
    for name in ("actor", "reference"):
        held_to(group[name].model, steps["actor"])
        ids_hold(group[name].model)


def test_critic_and_reward_are_the_model_of_step_2(group: Any, steps: Any) -> None:
    for name in ("critic", "reward"):
        model = group[name].model
        held_to(model, steps["reward"])
        ids_hold(model)
        assert (model.PAD_ID, model.num_padding_at_beginning) == (2, 1)
        with torch.no_grad():
            mask = torch.ones_like(IDS)
            ours = model.forward_value(IDS, mask, return_value_only=True)
            alike(ours, steps["reward"].values(IDS, mask))


def test_all_but_the_reference_have_the_dropout_of_the_command_line(group: Any) -> None:
    for name, rate in {"actor": 0.0, "reference": 0.1, "critic": 0.0, "reward": 0.0}.items():
        model = group[name].model
        assert model.config.dropout == rate, name
        (layer, *_) = [m for m in model.modules() if type(m).__name__ == "OPTDecoderLayer"]
        assert layer.dropout == rate, name


def test_two_of_the_four_are_trained(group: Any) -> None:
    for name in ("actor", "critic"):
        assert trainable(group[name].model) == set(parameters(group[name].model))
    for name in ("reference", "reward"):
        hold_frozen(group[name].model)


def test_the_tokenizer_is_the_one_that_is_named(group: Any) -> None:
    for name in group:
        tokenizer = group[name].tokenizer
        assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.padding_side) == (52, 2, "right")
