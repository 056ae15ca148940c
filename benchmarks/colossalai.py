"""Lazily built models: filled by streaming, by ``load_state_dict``, or never lazy at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .case import Case
from .loading import from_pretrained_as, weights_mib

TITLE = "ColossalAI: lazy initialisation"


def ours(folder: Path) -> Any:
    """Load through llmload: plan, lazy build, streaming fill, audit and report."""
    import llmload

    return llmload.load({"model": str(folder), "dtype": "bfloat16", "colossalai": {}})


def theirs(folder: Path) -> Any:
    """Build under ``LazyInitContext``, materialise, and load the state dict shard by shard.

    As its documentation shows, but for what makes it work at all today: built from the config, and
    without drawing values that the shards then overwrite.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, LlamaForCausalLM

    from llmload.builtin.colossalai import lazy_models
    from llmload.model.torch_defaults import default_dtype

    config = AutoConfig.from_pretrained(folder)
    with default_dtype(torch.bfloat16):
        with lazy_models.lazily("the model"):
            model = LlamaForCausalLM(config)
        lazy_models.lazy_init().LazyInitContext.materialize(model)
    missing = set(model.state_dict())
    for file in sorted(folder.glob("*.safetensors")):
        shard = load_file(file)
        model.load_state_dict(shard, strict=False)
        missing -= shard.keys()
    assert not missing
    return model.eval()


def import_colossalai() -> None:
    """Import what both lazy sides need, before the clock starts."""
    from llmload.builtin.colossalai import lazy_models

    lazy_models.lazy_init()


CASES = {
    "lazy": Case(
        title="bfloat16, lazily built and filled",
        sides={
            "llmload": ours,
            "LazyInitContext, load_state_dict": theirs,
            "from_pretrained": from_pretrained_as("bfloat16"),
        },
        target="never slower, peak at most 1.05x the model",
        final=weights_mib,
        prepare=import_colossalai,
        stacks=("modern", "colossalai"),
    ),
}
