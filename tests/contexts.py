"""The context of a load, made around a model that stands in memory."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from pydantic import BaseModel
from transformers import PreTrainedModel

import llmload
from llmload.checkpoint.untrusted import UntrustedFolder


def context_of(
    model: PreTrainedModel, section: BaseModel, *, wraps_adapter: bool = False
) -> llmload.LoadContext:
    """Make the context in which a plugin with ``section`` would see ``model`` rehearsed."""
    return llmload.LoadContext(
        spec=llmload.LoadSpec(model="in memory"),
        sections={"section": section},
        active=("section",),
        hooks=None,  # type: ignore[arg-type]
        folder=Path(),
        files=UntrustedFolder(Path()),
        config=copy.deepcopy(model.config),
        model_class=type(model),
        dtype=torch.float32,
        checkpoint=None,
        wraps_adapter=wraps_adapter,
    )
