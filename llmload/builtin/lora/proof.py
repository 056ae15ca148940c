"""Proves that the adapter is in place, can learn, and holds what its file holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from llmload.builtin.lora import resume
from llmload.builtin.lora.layers import adapter_parameters, lora_layers, own_name
from llmload.builtin.lora.names import translate_weights
from llmload.builtin.lora.request import Request, resolve
from llmload.plugin import Problem, partitions, some

if TYPE_CHECKING:
    from llmload.plugin import LoadContext

_REPORT = "Report this with the plan and the versions of `llmload env`."


def prove(ctx: LoadContext, model: nn.Module) -> Iterator[Problem]:
    """Yield what of the adapter is not as it was recorded when it was made."""
    facts: dict[str, Any] | None = ctx.facts.get("lora")
    if facts is None or not isinstance(model, PeftModel):
        yield Problem(
            where="lora",
            message=f"the finished model is a {type(model).__name__} without the adapter",
            fix="Another plugin wraps the model: remove its section or `lora`.",
        )
        return
    request = resolve(ctx)
    adapter = request.section.adapter_name
    layers = lora_layers(model, adapter)
    gone = [name for name in facts["targets"] if name not in layers]
    if gone:
        yield Problem(
            where="lora.target_modules", message=f"{some(gone)} lost the adapter", fix=_REPORT
        )
    idle = [
        name
        for name, layer in layers.items()
        if layer.disable_adapters or layer.merged or adapter not in layer.active_adapters
    ]
    if idle:
        yield Problem(
            where="lora.adapter_name",
            message=f"the adapter {adapter!r} is not active in {some(idle)}",
            fix=_REPORT,
        )
    if request.saved is None:
        yield from _start_values(request, layers, adapter)
    else:
        yield from _saved_values(request, model, adapter)
    yield from _merged_first(ctx, model)
    if request.section.ensure_weight_tying:
        yield from _tie(model, facts["tied"], adapter)


def prove_merged(ctx: LoadContext, model: nn.Module) -> Iterator[Problem]:
    """Yield what of an adapter is left in a model into which it was merged, or spoilt it."""
    left = [n for n, m in model.named_modules() if isinstance(m, PeftModel | LoraLayer)]
    if left:
        yield Problem(
            where="lora.merge",
            message=f"the adapter is still in place in {some(left)}",
            fix=_REPORT,
        )
        return
    yield from _not_finite(ctx.facts["lora"]["targets"], model, "lora.merge")
    yield from _merged_first(ctx, model)


def _merged_first(ctx: LoadContext, model: nn.Module) -> Iterator[Problem]:
    for names in ctx.facts["lora"].get("merged_first", {}).values():
        yield from _not_finite(names, model, "lora.merge_first")


def _not_finite(targets: Iterable[str], model: nn.Module, where: str) -> Iterator[Problem]:
    """Yield the layers that an adapter was merged into and that it spoilt."""
    # Several parameters of one module are adapted by layers around one another, and a later adapter
    # may be around it.
    wanted = set(map(own_name, targets))
    spoilt = [
        own_name(name)
        for name, parameter in model.named_parameters()
        if own_name(name).rpartition(".")[0] in wanted
        and "lora_" not in name
        and (part := partitions.held(parameter)) is not None
        and not part[0].isfinite().all()
    ]
    if spoilt:
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in spoilt))
        yield Problem(
            where=where,
            message=f"merged weights of {some(layers)} are not finite",
            fix="Load in a wider `dtype`, or check the adapter.",
        )


def _start_values(
    request: Request, layers: dict[str, LoraLayer], adapter: str
) -> Iterator[Problem]:
    """Look for factors that are all zero: of two, one may be, so that the adapter starts idle."""
    start = request.initialisation
    # These start with an effect; in pissa and its kin it replaces what was taken from the base.
    both = start in (False, "orthogonal") or (bool(request.changes_base) and start is not True)
    dead = []
    for name, layer in layers.items():
        factors = {
            kind: parameter
            for kind, parameter in adapter_parameters(layer, adapter).items()
            if kind.startswith(("lora_A", "lora_B", "lora_embedding_")) and "bias" not in kind
        }
        zero = [kind for kind, factor in factors.items() if not factor.any()]
        # An embedding starts with a factor at zero however linear layers do.
        strict = both and not isinstance(layer.get_base_layer(), nn.Embedding)
        if len(zero) == len(factors) or (strict and zero):
            dead.append(name)
    if dead:
        yield Problem(
            where="lora.init_lora_weights",
            message=f"the adapter's factors of {some(dead)} are zero, so that they cannot learn"
            if not both
            else f"{start!r} left factors of {some(dead)} at zero",
            fix=_REPORT,
        )


def _saved_values(request: Request, model: PeftModel, adapter: str) -> Iterator[Problem]:
    """Hold every value against the file's, bit by bit after the cast."""
    assert request.saved is not None
    known = resume.allowed(model, adapter).keys()
    saved = translate_weights(model, request.saved.read(), adapter, known)
    replaced = saved.keys() - resume.required(model, adapter).keys()
    with partitions.whole(resume.embeddings(model) if replaced else ()):
        held = resume.allowed(model, adapter)
        wrong = [
            name
            for name, tensor in saved.items()
            if not _equal(tensor.to(held[name].dtype), held[name].cpu())
        ]
    if wrong:
        yield Problem(
            where="lora.adapter",
            message=f"{some(wrong)} differ from the adapter in {str(request.saved.folder)!r}",
            fix=_REPORT,
        )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    # As bytes, so that NaN equals NaN and -0.0 differs from 0.0.
    return torch.equal(
        one.contiguous().view(torch.uint8), other.detach().contiguous().view(torch.uint8)
    )


def _tie(model: PeftModel, reached: list[str], adapter: str) -> Iterator[Problem]:
    base = model.get_base_model()
    storages: dict[str, set[int]] = {}
    for name in reached:
        module = base.get_submodule(name)
        held = (
            adapter_parameters(module, adapter).values()
            if isinstance(module, LoraLayer)
            else module.modules_to_save[adapter].parameters()
        )
        storages[name] = {tensor.untyped_storage().data_ptr() for tensor in held}
    if len({frozenset(found) for found in storages.values()}) > 1:
        yield Problem(
            where="lora.ensure_weight_tying",
            message=f"the adapters of {some(reached)} do not share their weights",
            fix="Use `adapter_dtype: base`, or `tied_weights: untie`.",
        )
