"""Run on every rank: what comes after a partitioned load, held against the same load whole."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters
from zero3.comparing import deepspeed_config, losses

import llmload

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def unlike_the_whole(spec: dict[str, Any], dtype: str) -> list[str]:
    """Load whole and partitioned, gather, and list the parameters that differ."""
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    split = llmload.load(spec | {"zero3": {"config": deepspeed_config(dtype)}}).model
    whole = llmload.load(spec).model
    expected = dict(whole.named_parameters())
    assert list(expected) == [name for name, _ in split.named_parameters()]
    different = []
    for name, parameter in split.named_parameters():
        assert parameter.numel() == 0, name
        with GatheredParameters(parameter):
            if not torch.equal(parameter, expected[name]):
                different.append(name)
    assert split.config.to_dict() == whole.config.to_dict()
    return different


def embeddings(folder: str, dtype: str) -> dict[str, Any]:
    spec = {
        "model": folder,
        "dtype": dtype,
        "tokenizer": {"add_tokens": ["<a>", "<b>"]},
        "embeddings": {"pad_to_multiple_of": 8, "init_new": "normal"},
        "dropout": {"p": 0.0},
        "gradient_checkpointing": {},
    }
    different = unlike_the_whole(spec, dtype)
    model = llmload.load(spec | {"zero3": {"config": deepspeed_config(dtype)}}).model
    return {"different": different, "losses": losses(model, "causal_lm", deepspeed_config(dtype))}


def lora(folder: str, dtype: str, adapter_dtype: str) -> dict[str, Any]:
    spec = {
        "model": folder,
        "dtype": dtype,
        "lora": {"r": 4, "target_modules": "all-linear", "adapter_dtype": adapter_dtype},
        "zero3": {"config": deepspeed_config(dtype)},
    }
    result = llmload.load(spec)
    dtypes = {str(p.dtype) for p in result.model.parameters() if p.requires_grad}
    report = result.report
    return {
        "dtypes": sorted(dtypes),
        "line": report.trainable_line(),
        "losses": losses(result.model, "causal_lm", deepspeed_config(dtype)),
    }
