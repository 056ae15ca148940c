"""Why a model cannot be saved as a folder that loads again; asked of the rehearsed model, without
values, before a weight is read, and of the loaded one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmload.errors import PlanError, Problem, some
from llmload.hf import deepspeed, installed_transformers
from llmload.model import partitions

if TYPE_CHECKING:
    from torch import nn

    from llmload.loading.prepared import Prepared

_OWN_WAY = "Save it with what it is trained with, which knows how its parts become a whole."


def hold_plan(prepared: Prepared) -> None:
    """Refuse a load whose model could not be saved.

    :raises PlanError: with every reason.
    """
    problems = list(_of_plan(prepared))
    if not problems and prepared.rehearsal is not None:
        problems = list(of_model(prepared.rehearsal.model))
    if problems:
        raise PlanError(problems)


def hold_model(model: nn.Module, awaiting: str | None) -> None:
    """Refuse a loaded model that cannot be saved.

    :param awaiting: who has yet to load its weights.
    :raises PlanError: with every reason.
    """
    problems = [_lazy(awaiting)] if awaiting else list(of_model(model))
    if problems:
        raise PlanError(problems)


def _of_plan(prepared: Prepared) -> Iterator[Problem]:
    ctx = prepared.ctx
    if ctx.awaiting is not None:
        yield _lazy(ctx.awaiting)
    spreading = prepared.host.implementing("distribute")
    if ctx.splits or spreading:
        yield _in_parts(ctx.placed_by or spreading[0])


def _lazy(awaiting: str) -> Problem:
    return Problem(
        message=f"the model has no weights to save: they come with {awaiting}",
        fix=f"Save it after {awaiting}, by its own means, or load it without.",
    )


def _in_parts(plugin: str = "") -> Problem:
    return Problem(
        where=plugin,
        message="the weights are kept in parts, of which no process has all",
        fix=f"Load it for saving without `{plugin}`: merging needs no GPU." if plugin else _OWN_WAY,
    )


def of_model(model: Any) -> Iterator[Problem]:
    """Yield what stands against saving a model, with values or without."""
    from transformers import PreTrainedModel

    if any(partitions.is_partitioned(parameter) for parameter in model.parameters()):
        yield _in_parts()
    elif is_peft(model):
        yield from _of_adapters(model)
    elif not isinstance(model, PreTrainedModel):
        yield Problem(
            message=f"a {type(model).__name__} is no model of transformers, and no adapter around"
            " one: no other program could load what is saved of it",
            fix="Save its `state_dict()` yourself, or the model inside it.",
        )
    elif is_quantised(model):
        yield from _of_quantised(model)
    else:
        yield from _of_plain(model)


def is_peft(model: Any) -> bool:
    """Say whether PEFT's adapters are around a model; a merged one may still name them."""
    from importlib.util import find_spec

    if find_spec("peft") is None:
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def is_quantised(model: Any) -> bool:
    """Say whether the weights of a model of transformers are stored in few bits."""
    return getattr(model.config, "quantization_config", None) is not None


def _of_adapters(model: Any) -> Iterator[Problem]:
    for name, config in model.peft_config.items():
        if getattr(config, "is_prompt_learning", False) or Path(name).name == name:
            continue
        yield Problem(
            message=f"PEFT saves the adapter {name!r} in a folder of that name, which is none",
            fix="Give the adapter another name.",
        )


def _of_quantised(model: Any) -> Iterator[Problem]:
    """Yield what transformers says of a quantised model; the rehearsed one has nothing to ask."""
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None and not quantiser.is_serializable():
        yield Problem(
            message="transformers cannot save weights that are quantised in this way",
            fix="Load it without, and quantise again where it is used.",
        )


def _of_plain(model: Any) -> Iterator[Problem]:
    """Yield how a model differs from what its class makes of its config: plain transformers would
    not load what is more, or make up what is less."""
    with deepspeed.hidden():
        blank = installed_transformers().blank(type(model), model.config, model.dtype)
    made, found = (_shapes(each) for each in (blank, model))
    more, less = found.keys() - made.keys(), made.keys() - found.keys()
    other = {name for name in found.keys() & made.keys() if found[name] != made[name]}
    for names, what in (
        (more, "has what its class does not know"),
        (less, "lacks what its class has"),
        (other, "has other shapes than its config gives"),
    ):
        if names:
            yield Problem(
                message=f"the {type(model).__name__} {what}, so that no other program could load"
                f" it from a folder: {some(sorted(names))}",
                fix="Save it without the plugin that changed it, or save its `state_dict()`"
                " yourself and load it with that plugin.",
            )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}
