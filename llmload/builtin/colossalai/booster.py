"""A lazy model for ``Booster.boost``, which loads the checkpoint that is recorded with the model.

The Booster takes weights by their names and is never strict: what it does not find keeps the memory
it was given, uninitialised. So everything that it would miss is found out here.

Imported by functions only: this module needs torch, transformers and colossalai.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from llmload.builtin.colossalai.lazy_models import (
    is_lazy,
    keep_dtype,
    lazy_init,
    lazy_tensors,
    materialise,
)
from llmload.builtin.colossalai.section import MATERIALISE, ColossalaiSection
from llmload.plugin import Problem, account, default_dtype, installed_transformers, main_file, some

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from llmload.plugin import LoadContext

_NEVER_MATERIALISES = {
    "TorchDDPPlugin": "ends the process on a lazy model, with a segmentation fault",
    "LowLevelZeroPlugin": "leaves a lazy model lazy, without weights",
}
"""What the Booster plugins of colossalai 0.5.0 that know nothing of lazy tensors do with them."""

_UNDER_PEFT = "base_model.model."

# Who calls one of these on a weight leaves its values alone.
_HARMLESS = (torch.Tensor.requires_grad_, vars(torch._C.TensorBase)["requires_grad"].__set__)


def why_not() -> str | None:
    """Return why no Booster can be had here, or None."""
    try:
        lazy_init()  # comes with the rest, and has to be tidied up after
        with warnings.catch_warnings():  # of what else could be installed
            warnings.simplefilter("ignore")
            import colossalai.booster.plugin  # noqa: F401
    except Exception as error:  # it imports much that other versions of transformers lack
        return f"{type(error).__name__}: {error}"
    return None


def check(ctx: LoadContext, section: ColossalaiSection) -> Iterator[Problem]:
    """Find what would go wrong with a model that stays lazy."""
    assert ctx.checkpoint is not None  # with `weights: random` there is a conflict
    if ctx.checkpoint.format == "pickle":
        yield Problem(
            where="colossalai.materialize",
            message="the Booster would open the pickled weights with torch.load, which runs"
            " whatever code is in them",
            fix=MATERIALISE,
        )
    if ctx.checkpoint.format == "other":
        yield Problem(
            where="colossalai.materialize",
            message="the Booster opens the files of weights by itself, and knows none that a plugin"
            " describes",
            fix=MATERIALISE,
        )
    kept = ctx.blank._keep_in_fp32_modules
    if kept and ctx.dtype == torch.float16:
        yield Problem(
            where="colossalai.materialize",
            message=f"{some(sorted(kept))} of {ctx.model_class.__name__} stay float32 beside"
            " float16, which a lazy model cannot tell the Booster",
            fix="Use `materialize: true`, or another `dtype`.",
        )


def adapter_problems(name: str, given: Mapping[str, Any], changes_base: str) -> Iterator[Problem]:
    """Find what of an adapter would be lost where the weights of its base come later.

    :param name: of the adapter in the model.
    :param given: the fields of PEFT's configuration that are set.
    """
    fields = ("use_dora", "modules_to_save", "trainable_token_indices")
    what = [field for field in fields if given.get(field)]
    what += [changes_base] if changes_base else []
    if what:
        yield Problem(
            where="colossalai.materialize",
            message=f"the adapter starts from the base's values ({', '.join(what)}), which come"
            " with Booster.boost",
            fix=MATERIALISE,
        )
    if name != "default":
        yield Problem(
            where="lora.adapter_name",
            message="a Booster finds the weights under an adapter only if it is called 'default',"
            f" and this one is called {name!r}",
            fix="Leave out `adapter_name`, or use `materialize: true`.",
        )


def plugin_problems(section: ColossalaiSection) -> Iterator[Problem]:
    """Say what is known not to work with the Booster plugin that the section names."""
    from colossalai.accelerator import get_accelerator

    where = "colossalai.plugin"
    if section.plugin in _NEVER_MATERIALISES and not section.materialize:
        yield Problem(
            where=where,
            message=f"{section.plugin} {_NEVER_MATERIALISES[section.plugin]}",
            fix=MATERIALISE,
        )
    if get_accelerator().name != "cpu":
        return
    if section.plugin in ("GeminiPlugin", "LowLevelZeroPlugin"):
        yield Problem(
            where=where,
            message=f"{section.plugin} needs an accelerator, and this machine has none",
            fix="Use HybridParallelPlugin with tp_size 1, or load where there is one.",
        )
    if section.pp_size > 1:
        yield Problem(
            where="colossalai.pp_size",
            severity="warning",
            message="each stage gets its weights here, and cannot be trained: stages talk over"
            " groups that colossalai takes for an accelerator's",
            fix="Use `pp_size: 1`, or train where there is an accelerator.",
        )
    if section.tp_size > 1:
        yield Problem(
            where="colossalai.tp_size",
            message="tensor parallelism needs an accelerator for its random states, and this"
            " machine has none",
            fix="Use `tp_size: 1`, or load where there is one.",
        )


def hand_over(ctx: LoadContext, model: PreTrainedModel) -> PreTrainedModel:
    """Make a lazily built model one that is right after ``Booster.boost``.

    :raises CheckpointError: the checkpoint does not fit, or lacks weights against ``strict``.
    """
    from colossalai.interface.pretrained import set_pretrained_path

    assert ctx.checkpoint is not None
    transformers = installed_transformers()
    account(ctx, transformers.account(model, ctx.checkpoint, tied=True))
    loaded = [name for name in model.state_dict() if name not in ctx.newly_initialised]
    with default_dtype(ctx.dtype):
        for name, lazy in list(lazy_tensors(model)):
            if name in ctx.newly_initialised:
                materialise(lazy)
    # Only this transformers has Boosters.
    model._initialize_missing_keys(loaded, False, False)
    for name, lazy in lazy_tensors(model):
        keep_dtype(lazy, ctx.dtype)
        if name in loaded:
            lazy._op_buffer.clear()  # the Booster overwrites what the constructor wrote
    # What the Booster reads in `boost`; colossalai's own from_pretrained notes it the same way.
    set_pretrained_path(model, str(main_file(ctx.folder)))
    transformers.finish(model, ctx.folder, None, trust_remote_code=ctx.spec.trust_remote_code)
    return model


def audit_lazy(ctx: LoadContext, model: nn.Module) -> Iterator[Problem]:
    """Find the weights that the Booster would leave without a value, or with another."""
    weights = dict(_weights_to_load(model))
    yield from _lost(ctx, model, {name: lazy.shape for name, lazy in weights.items()})
    used = [name for name, lazy in weights.items() if _computed_with(lazy)]
    if used:
        yield Problem(
            message=f"{some(used)} were changed or computed with before Booster.boost loads"
            " their values",
            fix=MATERIALISE,
        )


def unfound(ctx: LoadContext, model: nn.Module) -> Iterator[Problem]:
    """Find in the rehearsed model the weights that the Booster would find by no name."""
    assert ctx.checkpoint is not None  # with `weights: random` there is a conflict
    blank = ctx.blank
    base = blank.state_dict()
    skipped = {*ctx.accounting(blank).missing, *ctx.accounting(blank).excused}
    skipped |= installed_transformers().tied_names(blank)
    weights = {}
    # Of what is tied only the first name, as the Booster fills one tensor once.
    first = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for name, tensor in model.state_dict().items():
        if name not in first:
            continue
        plain = name.removeprefix(_UNDER_PEFT).replace(".base_layer.", ".")
        if plain in base and plain not in skipped:
            weights[name] = tensor.shape
    yield from _lost(ctx, model, weights)


def _lost(ctx: LoadContext, model: nn.Module, weights: Mapping[str, Any]) -> Iterator[Problem]:
    """Find weights of the model, given by name and shape, that the Booster would not find."""
    assert ctx.checkpoint is not None  # with `weights: random` there is a conflict
    stored = {name: info.shape for name, info in ctx.checkpoint.tensors.items()}
    found = _as_loaded(model, stored)
    lost = [name for name, shape in weights.items() if found.get(name) != tuple(shape)]
    if lost:
        yield Problem(
            message=f"Booster.boost would load nothing into {some(lost)}: it finds weights"
            " by their names in the checkpoint",
            fix=MATERIALISE,
        )


def _weights_to_load(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield lazy parameters and persistent buffers, each by the first name that it has."""
    stored = model.state_dict().keys()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in stored and is_lazy(tensor):
            yield name, tensor


def _as_loaded(model: nn.Module, stored: dict[str, Any]) -> dict[str, Any]:
    """Put the checkpoint's entries under the names in ``model`` that the Booster loads them to."""
    from colossalai.interface.model import PeftUnwrapMixin
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return stored
    base = PeftUnwrapMixin(model)
    return {_UNDER_PEFT + name: shape for name, shape in base.patch_state_dict(stored).items()}


def _computed_with(lazy: Any) -> bool:
    return lazy._materialized_data is not None or any(
        operation not in _HARMLESS for operation, *_ in lazy._op_buffer
    )
