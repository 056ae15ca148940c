"""The context of a load, made around a model that stands in memory."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from pydantic import BaseModel
from transformers import PreTrainedModel

import llmload
from llmload.checkpoint.untrusted import UntrustedFolder
from llmload.hf import installed_transformers
from llmload.hf.engine import Engine
from llmload.plugin import Checkpoint


def context_of(
    model: PreTrainedModel,
    *sections: BaseModel,
    folder: Path | None = None,
    rehearsing: bool = True,
    wraps_adapter: bool = False,
) -> llmload.LoadContext:
    """Make the context in which the hooks of a plugin see ``model``, for a test of one hook.

    No plugin has been called. What other plugins leave in the context, such as ``ctx.tokenizer``,
    the test sets itself.

    :param sections: what ``ctx.section`` finds, by their types.
    :param folder: of a checkpoint, whose headers become ``ctx.checkpoint``; without it there is
        none, as with ``weights: random``.
    :param rehearsing: whether the hook is to see the plan being made, or the load.
    :param wraps_adapter: whether a plugin is to wrap the model in an adapter later on.
    """
    ctx = llmload.LoadContext(
        spec=llmload.LoadSpec(model=str(folder or "in memory")),
        sections={type(section).__name__: section for section in sections},
        active=tuple(type(section).__name__ for section in sections),
        hooks=None,  # type: ignore[arg-type]
        folder=folder or Path(),
        files=UntrustedFolder(folder or Path()),
        config=copy.deepcopy(model.config),
        model_class=type(model),
        dtype=torch.float32,
        checkpoint=None if folder is None else Checkpoint.open(folder),
        wraps_adapter=wraps_adapter,
        engine=Engine(installed_transformers()),
    )
    return ctx.for_run(rehearsing=rehearsing)
