"""How the checkpoint fits the model, said in the plan: all that headers and config tell."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

from llmload.checkpoint.accounting import as_quantised
from llmload.checkpoint.dtypes import torch_dtype
from llmload.errors import CheckpointError, Problem, some
from llmload.hf import fusions, generation, installed_transformers, quantised, token_ids
from llmload.hf.bars import muted
from llmload.loading import audit
from llmload.spec.suggest import closest
from llmload.spec.values import SPREADS, dtype_name

if TYPE_CHECKING:
    from torch import nn

    from llmload.checkpoint.accounting import Accounting
    from llmload.context.context import LoadContext

ADAPTER_CONFIG = "adapter_config.json"
"""By this file transformers finds an adapter."""

_FEW = 12
"""Token ids up to which they are written out."""


def problems(ctx: LoadContext) -> Iterator[Problem]:
    """Yield what of the checkpoint does not fit the model, for every loader alike.

    For after all plugins' ``check``, which say what need not be in the checkpoint.

    :raises CheckpointError: the model cannot be built.
    """
    if ctx.checkpoint is None:
        return
    yield from _undecided_adapter(ctx)
    yield from _unknown_places(ctx)
    yield from _absent_devices(ctx)
    config = ctx.config
    stored = quantised.declared(config)
    if stored is not None and not quantised.by_bitsandbytes(stored):  # which has its own section
        tensors = ctx.checkpoint.tensors
        yield from quantised.problems(ctx.blank, config, ctx.spec, ctx.dtype, tensors)
    yield from fusions.problems(config)
    yield from generation.problems(ctx.folder, ctx.model_class)
    if installed_transformers().unsuited() is not None:
        if stored is None:
            yield from _not_floats(ctx)
        return
    if getattr(config, "fusion_config", None) or getattr(type(config), "extra_files", ()):
        return  # transformers makes other tensors of them, or reads further ones
    found = ctx.accounting(ctx.blank)
    if stored is not None:
        found = as_quantised(ctx.blank, found)
    for name, trace in found.failed.items():
        reason = trace.splitlines()[-1].removeprefix("Error: ")
        yield Problem(
            where=name,
            message=f"transformers cannot make it of the checkpoint's tensors: {reason}",
            fix="Check that config.json and weights belong together.",
        )
    yield from found.misfits()
    if stored is None and installed_transformers().leaves_small_floats():
        yield from _small_floats(ctx, found)
    yield from _keys(ctx, found)


def _small_floats(ctx: LoadContext, found: Accounting) -> Iterator[Problem]:
    """Refuse weights of 8 bits that nothing would make numbers of the model's dtype."""
    import transformers

    for name, info in found.as_stored.items():
        if info.dtype[:2] == "F8":
            yield Problem(
                where=name,
                message=f"the checkpoint has {info.dtype} {info.shape}, which transformers"
                f" {transformers.__version__} leaves so in a model in {dtype_name(ctx.dtype)}",
                fix="Convert them beforehand, or use transformers 5, which casts them.",
            )


def _not_floats(ctx: LoadContext) -> Iterator[Problem]:
    """Refuse weights that from_pretrained would cast from integers, where only names tell."""
    assert ctx.checkpoint is not None
    parameters = dict(ctx.blank.named_parameters(remove_duplicate=False))
    for name, info in ctx.checkpoint.tensors.items():
        kind, parameter = torch_dtype(info.dtype), parameters.get(name)
        if parameter is None or kind is None or kind.is_floating_point:
            continue
        if parameter.is_floating_point():
            expected = f"{dtype_name(parameter.dtype)} {tuple(parameter.shape)}"
            yield Problem(
                where=name,
                message=f"the checkpoint has {dtype_name(kind)} {info.shape}, the"
                f" model takes {expected}",
                fix="Check that config.json and weights belong together.",
            )


def _unknown_places(ctx: LoadContext) -> Iterator[Problem]:
    """Refuse keys of ``device_map`` that no module or parameter takes."""
    asked = ctx.spec.device_map
    if not isinstance(asked, Mapping):
        return
    names = {name for name, _ in ctx.blank.named_modules()} | ctx.blank.state_dict().keys()
    for key in asked:
        if key not in names:
            close = closest(key, names)
            yield Problem(
                where=f"device_map.{key}",
                message=f"no module of {ctx.model_class.__name__} is called {key!r}",
                fix=f"The nearest: {', '.join(close)}."
                if close
                else "Give names of modules as they are in the model, such as"
                f" {next(name for name in names if name)!r}.",
            )


def _absent_devices(ctx: LoadContext) -> Iterator[Problem]:
    """Refuse devices that this machine does not have."""
    import torch

    if ctx.machine.device_memory is not None:
        return  # the plan is for another machine
    asked = ctx.spec.device_map
    by_key = asked if isinstance(asked, Mapping) else {"": asked}
    named = {f"device_map.{key}" if key else "device_map": device for key, device in by_key.items()}
    most = ctx.spec.most_memory or {}
    named.update((f"max_memory.{device}", device) for device in most)
    for where, device in named.items():
        number = device if isinstance(device, int) else None
        kind, _, index = str(device).partition(":")
        if number is not None:
            found, kind = _accelerators(), "accelerator"
        elif device is None or kind in ("cpu", *SPREADS):
            continue
        else:
            module: Any = getattr(torch, kind, None)
            found = module.device_count() if hasattr(module, "device_count") else 0
            number = int(index or 0)
        if number >= found:
            here = f"of kind {kind!r} there {'is' if found == 1 else 'are'} {found or 'none'} here"
            yield Problem(
                where=where,
                message=f"there is no device {device!r}: {here}",
                fix="Name one that is here, or remove `device_map` for the CPU."
                if device not in most
                else "Name one that is here, or remove the key.",
            )


def device_map(ctx: LoadContext) -> dict[str, int | str]:
    """Return where the modules will go, by name; empty for the CPU, and where transformers finds
    out only in the load, by the sizes of quantised weights.

    For a machine that is described, what spreads goes by the memory that the description says.
    """
    asked = ctx.spec.device_map
    if isinstance(asked, Mapping):
        return dict(asked)
    if asked is None or ctx.checkpoint is None:
        return {}
    if asked not in SPREADS:
        return {"": asked}
    quantises = ctx.providing("quantisation") or quantised.declared(ctx.config) is not None
    if quantises or ctx.splits or installed_transformers().unsuited() is not None:
        return {}
    most = ctx.spec.most_memory or _described_memory(ctx)
    elsewhere = ctx.machine.device_memory is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the load itself gives them again
        # accelerate says of each device of another machine that it is not here.
        with muted("accelerate.utils.modeling") if elsewhere else nullcontext():
            found = installed_transformers().resolve_device_map(ctx.blank, asked, most, tied=False)
    return {
        name: place if isinstance(place, int) else str(place)
        for name, place in (found or {}).items()
    }


def _described_memory(ctx: LoadContext) -> dict[int | str, int | str] | None:
    """Return what a described machine has, as `max_memory` says it: one accelerator per rank."""
    machine = ctx.machine
    if machine.device_memory is None:
        return None
    # transformers leaves a tenth of one accelerator free where nobody says how much to take.
    most: dict[int | str, int | str] = {0: int(machine.device_memory) * 9 // 10}
    if machine.host_memory is not None:
        most["cpu"] = int(machine.host_memory)
    return most


def places(ctx: LoadContext, found: Mapping[str, int | str]) -> Iterator[Problem]:
    """Refuse a model for which the memory of all places together is too little.

    :param found: as :func:`device_map` finds it.
    """
    if "disk" in found.values():
        limited = "what `max_memory` gives" if ctx.spec.max_memory else "the memory of all of them"
        yield Problem(
            where="max_memory" if ctx.spec.max_memory else "device_map",
            message=f"{ctx.spec.device_map!r} leaves modules without a device: {limited} is too"
            " little for the model, and weights are not kept on a disk",
            fix=f"{'Give more, quantise' if ctx.spec.max_memory else 'Quantise'} with `kbit`,"
            " partition with `zero3`, or take a smaller model.",
        )


def _accelerators() -> int:
    import torch

    kinds = torch.accelerator if hasattr(torch, "accelerator") else torch.cuda  # since torch 2.6
    return int(kinds.device_count())


def adapter_beside(ctx: LoadContext) -> bool:
    """Whether an adapter lies beside the weights, where transformers would load it along."""
    checkpoint = ctx.checkpoint
    return checkpoint is not None and (checkpoint.root / ADAPTER_CONFIG).exists()


def untrained(ctx: LoadContext, model: nn.Module) -> Iterator[Problem]:
    """Warn of what a training of the finished model would leave as it is, against all expectation.

    :param model: as it came out of the rehearsal.
    """
    if not ctx.spec.trainable:
        return
    if not any(parameter.requires_grad for parameter in model.parameters()):
        quantised = ctx.providing("quantisation")
        if quantised and not ctx.wraps_adapter:
            yield Problem(
                where=quantised[0],
                severity="warning",
                message="no parameter will be trainable: quantised weights are frozen, and nothing"
                " is put on them",
                fix="Add an adapter with `lora`, or write `trainable: false` if this is meant.",
            )
        return
    # Nobody needs to learn what padding is.
    padding = getattr(ctx.tokenizer, "pad_token", None)
    new = {token: number for token, number in ctx.new_tokens.items() if token != padding}
    if not (new and ctx.wraps_adapter):
        return
    try:
        embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    except (AttributeError, NotImplementedError):
        return
    if embedding is not None and not any(p.requires_grad for p in embedding.parameters()):
        ids = sorted(new.values())
        yield Problem(
            where="lora.trainable_token_indices",
            severity="warning",
            message=f"the new tokens {some([*new])} have rows in a frozen embedding: no"
            " training will change what they mean",
            fix=f"Write `trainable_token_indices: {ids}` to train these rows,"
            " or name the embedding and the head in `modules_to_save`."
            if len(ids) <= _FEW
            else "Name the embedding and the head in `modules_to_save`.",
        )


def ids_without_rows(ctx: LoadContext, model: nn.Module) -> Iterator[Problem]:
    """Warn of token ids in the model's configs that its embeddings have no row for.

    :param model: as it came out of the rehearsal.
    """
    config = None
    if ctx.checkpoint is not None:  # else the model makes its own of the config
        with suppress(CheckpointError):  # which was told already
            config = generation.read(ctx.folder, ctx.model_class)
    yield from token_ids.without_rows(model, ctx.config, config, ctx.tokenizer)


def _undecided_adapter(ctx: LoadContext) -> Iterator[Problem]:
    if not adapter_beside(ctx):
        return
    assert ctx.checkpoint is not None
    folder = ctx.checkpoint.root
    taken = ctx.adapter_from is not None and ctx.adapter_from.resolve() == folder.resolve()
    if not taken and not ctx.spec.ignore_adapter:
        yield Problem(
            where="ignore_adapter",
            message=f"the folder {str(folder)!r} holds an adapter beside the model's weights, and"
            " the spec does not say what becomes of it",
            fix=f"Write `lora: {{adapter: {folder}}}` to resume it, with `merge: true` to merge it,"
            " or `ignore_adapter: true` to leave it out.",
        )
    elif taken and ctx.spec.ignore_adapter:
        yield Problem(
            where="ignore_adapter",
            message=f"the adapter in {str(folder)!r} is to be left out, and it is named as the one"
            " to resume",
            fix="Remove `ignore_adapter`, or `adapter`.",
        )


def _keys(ctx: LoadContext, found: Accounting) -> Iterator[Problem]:
    """Hold the names to ``strict``, as the load will."""
    lost = dict.fromkeys(found.missing, audit.MISSING)
    try:
        audit.hold_to_strict(ctx, lost, found.unexpected)
        yield from audit.excused(ctx, lost, found.unexpected)
    except CheckpointError as error:
        yield from error.problems
