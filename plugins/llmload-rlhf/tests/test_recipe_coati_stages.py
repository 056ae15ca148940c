"""examples/coati_reward_model.yaml and coati_ppo.yaml load what stages 2 and 3 of old Coati train.

What its scripts do is written down here from ColossalAI v0.3.4, applications/Chat: models, heads,
and the files that its save_pretrained leaves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from making import alike, dtype_option, example, read, write
from torch import nn
from transformers import AutoTokenizer, GPT2LMHeadModel, GPT2Model

import llmload
from llmload.testing import IDS, hold_frozen, parameters, same, tiny_checkpoint, trainable

GPT2 = "openai-community/gpt2"


class Wrapper(nn.Module):
    """Coati's actor: a causal model under the name ``model``."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = GPT2LMHeadModel.from_pretrained(folder, **dtype_option(torch.float32))


class Critic(nn.Module):
    """Coati's critic: a head that starts as torch starts it, and the value of the last token."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = GPT2Model.from_pretrained(folder, **dtype_option(torch.float32))
        self.value_head = nn.Linear(self.model.config.n_embd, 1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        values = self.value_head(self.model(ids, attention_mask=mask)[0]).squeeze(-1)
        last = (mask * torch.arange(ids.shape[1])).argmax(1, keepdim=True)
        return values.gather(1, last).squeeze(1)


class RewardModel(Critic):
    """Coati's reward model: as the critic, from another start."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        size = self.model.config.n_embd
        self.value_head.weight.data.normal_(mean=0.0, std=1 / (size + 1))


def save_pretrained(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Save as Coati's strategies do: config, tokenizer, and a pickle of keys cut short."""
    model.model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    state = {key.replace("model.", "", 1): value for key, value in model.state_dict().items()}
    return write(folder, state)


def moved(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter another value, as a training run does."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("coati") / "gpt2", "gpt2")


def held_to(ours: Any, theirs: nn.Module) -> None:
    mine, other = parameters(ours), dict(theirs.named_parameters(remove_duplicate=False))
    assert mine.keys() == other.keys()
    for name, parameter in mine.items():
        assert same(parameter, other[name]), name


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones_like(IDS)
    mask[0, 7:] = 0
    return IDS, mask


# --- stage 2 ------------------------------------------------------------------------------------


def test_the_reward_model_is_coatis(base: Path) -> None:
    torch.manual_seed(7)
    result = llmload.load(example("coati_reward_model", {GPT2: base}))
    torch.manual_seed(7)
    theirs = RewardModel(base).to(torch.bfloat16).eval()
    held_to(result.model, theirs)
    assert set(result.report.newly_initialised) == {"value_head.weight", "value_head.bias"}
    assert trainable(result.model) == set(parameters(result.model))
    assert result.tokenizer.pad_token_id == 2
    ids, mask = batch()
    with torch.no_grad():
        assert same(result.model(ids, attention_mask=mask), theirs(ids, mask))


# --- stage 3 ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The trained models of stages 1 and 2, and the folders they were saved to."""
    place = tmp_path_factory.mktemp("stages")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    actor = moved(Wrapper(base).to(torch.bfloat16), 1)
    reward = moved(RewardModel(base).to(torch.bfloat16), 2)
    folders = {
        "coati/sft": save_pretrained(actor, tokenizer, place / "sft"),
        "coati/rm": save_pretrained(reward, tokenizer, place / "rm"),
    }
    return {"actor": actor.eval(), "reward": reward.eval(), "folders": folders}


@pytest.fixture(scope="module")
def group(stages: dict[str, Any]) -> Any:
    return llmload.load_group(example("coati_ppo", stages["folders"]))


def test_actor_and_initial_model_are_the_actor_of_stage_1(group: Any, stages: Any) -> None:
    for name in ("initial_model", "actor"):
        held_to(group[name].model, stages["actor"].model)


def test_reward_model_and_critic_are_the_reward_model_of_stage_2(group: Any, stages: Any) -> None:
    ids, mask = batch()
    for name in ("reward_model", "critic"):
        held_to(group[name].model, stages["reward"])
    with torch.no_grad():
        for name in ("reward_model", "critic"):  # of each sequence one value
            ours = group[name].model(ids, attention_mask=mask)
            assert ours.shape == (len(ids),)
            alike(ours, stages["reward"](ids, mask))


def test_what_coatis_own_reading_loses_of_the_reward_model_is_there(
    group: Any, stages: Any, base: Path
) -> None:
    """Its file has lost ``model.``, so that ``strict=False`` takes the head and nothing else."""
    coatis = RewardModel(base).to(torch.bfloat16)
    found = coatis.load_state_dict(read(stages["folders"]["coati/rm"]), strict=False)
    assert set(found.missing_keys) == {n for n in coatis.state_dict() if n.startswith("model.")}
    lost = coatis.model.h[0].attn.c_attn.weight
    assert not torch.equal(lost, stages["reward"].model.h[0].attn.c_attn.weight)
    held_to(group["reward_model"].model, stages["reward"])


def test_two_of_the_four_are_trained(group: Any) -> None:
    for name in ("actor", "critic"):
        assert trainable(group[name].model) == set(parameters(group[name].model))
    for name in ("initial_model", "reward_model"):
        hold_frozen(group[name].model)


def test_the_tokenizer_pads_with_eos_on_the_left(group: Any) -> None:
    for name in group:
        tokenizer = group[name].tokenizer
        assert (tokenizer.pad_token_id, tokenizer.padding_side) == (2, "left")
