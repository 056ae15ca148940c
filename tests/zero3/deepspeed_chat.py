"""Run on every rank: DeepSpeed-Chat's ``create_hf_model``, told anew, and our load of the same.

Written from what that function does (DeepSpeedExamples 45b4b715, dschat/utils/model/model_utils.py)
with transformers and DeepSpeed alone.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import transformers
from deepspeed.runtime.zero import GatheredParameters
from transformers.integrations import HfDeepSpeedConfig
from zero3.comparing import deepspeed_config, losses

import llmload
from llmload.model import partitions

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

DROPOUT_KEYS = ("dropout", "attention_dropout", "hidden_dropout", "activation_dropout")


def theirs(
    folder: str, tokenizer: Any, ds_config: dict[str, Any], rlhf_training: bool, dropout: float
) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    for key in DROPOUT_KEYS:
        if hasattr(config, key):
            setattr(config, key, dropout)
    alive = HfDeepSpeedConfig(ds_config)
    if rlhf_training:
        model = transformers.AutoModelForCausalLM.from_config(config)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config)
    model.config.end_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.config.eos_token_id
    model.resize_token_embeddings(int(8 * math.ceil(len(tokenizer) / 8.0)))
    del alive
    return model


def ours(folder: str, ds_config: dict[str, Any], rlhf_training: bool, dropout: float) -> Any:
    return llmload.load(
        {
            "model": folder,
            "dtype": "float32",
            "weights": "random" if rlhf_training else "pretrained",
            "tokenizer": {
                "pad_token": "eos",
                "padding_side": "right",
                "eos_config_fields": ["end_token_id"],
            },
            "embeddings": {"pad_to_multiple_of": 8, "allow_shrink": True},
            "dropout": {"p": dropout},
            "zero3": {"config": ds_config},
        }
    )


def compare(folder: str, saved: str, rlhf_training: bool, dropout: float) -> dict[str, Any]:
    """Make the model both ways; with ``rlhf_training`` fill both from the state dict ``saved``."""
    ds_config = deepspeed_config("float32")
    result = ours(folder, ds_config, rlhf_training, dropout)
    mine, tokenizer = result.model, result.tokenizer
    other = theirs(folder, tokenizer, ds_config, rlhf_training, dropout)
    equal_ranks = _equal_on_all_ranks(mine)
    if rlhf_training:
        state = torch.load(saved, map_location="cpu", weights_only=True)
        partitions.load_state_dict(mine, state)
        with GatheredParameters(list(other.parameters()), modifier_rank=0):
            other.load_state_dict(state)
    answer: dict[str, Any] = {"equal_ranks": equal_ranks, "tokens": len(tokenizer)}
    different, rows = [], {}
    both = [*mine.parameters(), *other.parameters()]
    names = dict(other.named_parameters(remove_duplicate=False))
    known = min(mine.config.vocab_size, transformers.AutoConfig.from_pretrained(folder).vocab_size)
    with GatheredParameters(both):
        for name, parameter in mine.named_parameters(remove_duplicate=False):
            found, expected = parameter, names.pop(name)
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                rows[name] = [len(found), len(expected)]
                if not rlhf_training:  # of new rows, ours are the mean; theirs are drawn about it
                    mean = found[:known].mean(0)
                    assert torch.allclose(found[known:], mean.expand_as(found[known:]))
                    found, expected = found[:known], expected[:known]
            if not torch.equal(found, expected):
                different.append(name)
    answer |= {"different": [*different, *names], "rows": rows, "known": known}
    answer["padded"] = [m.config.pad_token_id for m in (mine, other)]
    answer["ends"] = [m.config.end_token_id for m in (mine, other)]
    answer["vocabulary"] = [m.config.vocab_size for m in (mine, other)]
    answer["dropout"] = [_dropout(model) for model in (mine, other)]
    if rlhf_training and not dropout:
        # Both modes are what they trained with; neither draws anything.
        answer["losses"] = [losses(m.train(), "causal_lm", ds_config) for m in (mine, other)]
    return answer


def _dropout(model: Any) -> dict[str, float]:
    """Every dropout probability in the config and on a module."""
    found = {key: getattr(model.config, key) for key in DROPOUT_KEYS if hasattr(model.config, key)}
    for name, module in model.named_modules():
        for key in ("p", *DROPOUT_KEYS):
            if isinstance(getattr(module, key, None), float):
                found[f"{name}.{key}"] = getattr(module, key)
    return found


def _equal_on_all_ranks(model: Any) -> bool:
    with GatheredParameters(list(model.parameters())):
        total = torch.stack([p.double().abs().sum() for p in model.parameters()])
    everyone = [torch.empty_like(total) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, total)
    return all(torch.equal(total, one) for one in everyone)
