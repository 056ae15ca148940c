"""transformers' own sequence classification with one label: nothing to wrap, little to see to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmload import Note, Problem, RequestError
from llmload.plugin import some
from llmload_rlhf.layouts import LANGUAGE_MODEL_HEADS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmload import LoadContext


def map_keys(ctx: LoadContext, section: Any, keys: tuple[str, ...]) -> dict[str, str | None]:
    """Leave out a language model's head where a new head takes its place."""
    _refuse_class(ctx)
    if not section.new:
        return {}
    return {key: None for key in keys if key.startswith(LANGUAGE_MODEL_HEADS)}


def check(ctx: LoadContext, section: Any) -> Iterator[Problem | Note]:
    """Give the config its one label, and say where the head comes from."""
    _refuse_class(ctx)
    if section.new:
        ctx.configure(num_labels=1)
    elif ctx.checkpoint is None:
        raise RequestError(
            "with `weights: random` there is no head to load",
            fix="Write `reward_head: {new: true}`.",
            where="reward_head",
        )
    elif ctx.config.num_labels != 1:
        yield Problem(
            where="reward_head",
            message=f"a reward model has one label, and the config has {ctx.config.num_labels}",
            fix="Write `reward_head: {new: true}` to start with a new head of one label.",
        )
        return
    stored = ctx.checkpoint.tensors if ctx.checkpoint is not None else {}
    heads = head_names(ctx.blank)
    found = [name for name in heads if name in stored]
    if section.new and found:
        yield Problem(
            where="reward_head",
            message=f"a new head is asked for, and the checkpoint has one: {some(found)}",
            fix="Remove `new` from `reward_head`.",
        )
    elif section.new:
        ctx.to_initialise.update(dict.fromkeys(heads, "a new sequence_classification head"))
    elif len(found) < len(heads):
        missing = [name for name in heads if name not in stored]
        yield Problem(
            where="reward_head",
            message=f"the checkpoint has no {some(missing)}",
            fix="Write `reward_head: {new: true}` to start with a new head, or map the keys.",
        )
    start = "new" if section.new else "from the checkpoint"
    yield Note(text=f"sequence_classification: {', '.join(heads)}, {start}")


def finish(ctx: LoadContext, section: Any, model: PreTrainedModel) -> PreTrainedModel:
    """Set the head's dtype and whether it is trained."""
    for name in head_names(model):
        parameter = model.get_parameter(name)
        parameter.requires_grad_(section.trainable)
        if section.dtype is not None:
            import torch

            parameter.data = parameter.data.to(getattr(torch, section.dtype))
    return model


def head_names(model: PreTrainedModel) -> list[str]:
    """Return the parameters that do not belong to the transformer."""
    prefix = f"{model.base_model_prefix}."
    return [name for name, _ in model.named_parameters() if not name.startswith(prefix)]


def _refuse_class(ctx: LoadContext) -> None:
    if ctx.spec.auto_class != "sequence_classification" and ":" not in ctx.spec.auto_class:
        raise RequestError(
            "`reward_head: {layout: sequence_classification}` is transformers' class"
            f" of that name, and {ctx.spec.auto_class!r} is asked for",
            fix="Write `auto_class: sequence_classification`.",
            where="auto_class",
        )
