"""Puts the adapter around the model, in the rehearsal and in the load by the same steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import peft
import torch
from torch import nn

from llmload.builtin.lora import resume, targets, ties
from llmload.builtin.lora.dispatch import Dispatcher, record
from llmload.builtin.lora.gathering import gathering
from llmload.builtin.lora.layers import adapter_parameters, lora_layers, merged_into, own_name
from llmload.builtin.lora.names import translate_targets
from llmload.builtin.lora.outlines import dequantised_by_shape, is_quantised
from llmload.builtin.lora.request import (
    Request,
    blamed_on,
    heard,
    merged_first,
    refused,
    resolve,
)
from llmload.builtin.lora.section import LoraSection
from llmload.builtin.lora.without_bitsandbytes import asked_once_imported
from llmload.plugin import Problem, RequestError, alike, matching_within_budget, partitions

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from llmload.plugin import LoadContext

PREFIX: Final = "base_model.model."
"""Goes before the base model's names in a ``PeftModel``."""

_NOT_MERGED: Final = "Resume it as the section's `adapter`, without `merge`."

# Initialisations that PEFT cannot run on the meta device; names and shapes are those of any other.
_NEED_VALUES: Final = ("corda", "loftq")


def carry_out(ctx: LoadContext, model: PreTrainedModel) -> PeftModel | PreTrainedModel:
    """Merge what is to be merged first, and put the section's own adapter around ``model``, or into
    it. What came of it is recorded under ``ctx.facts["lora"]``.

    :raises RequestError: PEFT refuses the adapter, a name matches nothing, the adapter reaches tied
        weights without a choice, or a saved adapter does not fit.
    """
    with matching_within_budget():
        merged: dict[str, list[str]] = {}
        changed: list[nn.Parameter] = []
        for request in merged_first(ctx):
            with blamed_on("lora.merge_first"):
                wrapped = _install(ctx, request, model)
                changed += merged_into(wrapped, request.section.adapter_name)
                model = _merge(ctx, request, wrapped)
            merged[str(request.section.adapter)] = ctx.facts["lora"]["targets"]
        request = resolve(ctx)
        wrapped = _install(ctx, request, model)
        if merged:
            ctx.record("lora", {"merged_first": merged})
        if request.section.merge:
            changed += merged_into(wrapped, request.section.adapter_name)
            model = _merge(ctx, request, wrapped)
            ctx.merged_into.update(_named(changed, model))
            return model
        ctx.merged_into.update(_named(changed, wrapped))
        if merged:
            record(
                wrapped.peft_config[request.section.adapter_name],
                llmload_merged_first=list(merged),
            )
        return wrapped


def _install(ctx: LoadContext, request: Request, model: PreTrainedModel) -> PeftModel:
    section = request.section
    untied = ties.untie(model) if section.tied_weights == "untie" else {}
    with heard():  # what it warns of, `check` has told
        config = _config(ctx, request, model)
    unmatched = targets.hold_to_names(request, config, model)
    targets.refuse_rows_beyond(request, model)
    linear = targets.linear_layers(model)
    tied = ties.tied_embeddings(model)
    trial = _trial(ctx, request, model)
    # Held, not only their ids: PEFT may replace one, and its id would be given away again.
    before = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}

    with heard() as warned:
        wrapped = _wrap(ctx, request, model, config)
    reached = ties.reached(wrapped, tied)
    ties.refuse_undecided(request, reached, tied)
    ties.refuse_rows_apart(request, wrapped, tied)
    ties.refuse_rows_untied(request, wrapped, untied)
    if untied and config.to_dict().get("trainable_token_indices") is not None:
        record(config, llmload_tied_weights="untie")
    _set_dtype(ctx, request, wrapped)
    if section.ensure_weight_tying:
        tied_again = ties.tie_again(wrapped, section.adapter_name)
        if ctx.splits and not section.merge:
            ties.refuse_parted(ctx.placed_by, tied_again)
    layers = lora_layers(wrapped, section.adapter_name)
    targets.hold_to_layers(request, model, layers)
    targets.refuse_ranks_beyond(request, layers, section.adapter_name)
    if ctx.rehearsing:
        targets.refuse_what_returns_no_tensor(layers)
    if trial is not None:
        _refuse_other_targets(request, set(layers), trial)

    _account(ctx, request, wrapped, before, untied)
    changed = [f"{PREFIX}{name}.base_layer.weight" for name in layers if request.changes_base]
    ctx.changed_base.update(dict.fromkeys(changed, request.changes_base))
    if request.saved is not None:
        replaced = resume.restore(ctx, request.saved, wrapped, section.adapter_name)
        ctx.changed_base.update(dict.fromkeys(replaced, f"the adapter in {section.adapter!r}"))
        changed += replaced
    ctx.record(
        "lora",
        {
            "targets": list(layers),
            "unmatched": unmatched,
            "left_out": targets.by_kind(set(linear) - layers.keys()),
            "changed_base": changed,
            "tied": reached,
            "untied": list(untied),
            "warnings": warned,
        },
    )
    if ctx.rehearsing:
        for line in alike(layers):
            ctx.show("lora", "LoRA on", line)
    if section.inference_mode:
        # peft 0.13 leaves the modules to save trainable.
        wrapped.requires_grad_(False)
    # PEFT makes its modules in training mode, whatever the base model's.
    return wrapped.train(model.training)


def _merge(ctx: LoadContext, request: Request, model: PeftModel) -> PreTrainedModel:
    """Add the adapter to the base's weights and return the plain model, frozen.

    Of a partitioned model one layer after the other is gathered, on all ranks alike.

    :raises RequestError: PEFT cannot merge the adapter, or the result could not be equal to the
        model before.
    """
    adapter = request.section.adapter_name
    base = model.get_base_model()
    repeated = ties.part_repeated_layers(model) if request.fields.get("layer_replication") else []
    tied = {own_name(n): module for n, module in ties.tied_embeddings(base).items()}
    together = ties.together_when_merged(request, model)
    try:
        with heard():  # that what is merged already is not merged again
            for layer in lora_layers(model, adapter).values():
                if ctx.rehearsing:  # KaSA waits for values to truncate, where there are none
                    getattr(layer, "_lora_kasa_truncation_deferred", set()).discard(adapter)
                with partitions.whole(layer.get_base_layer().parameters(recurse=False)):
                    # PEFT's safe_merge would round the adapter's part to the base's dtype before
                    # adding it.
                    layer.merge(safe_merge=False, adapter_names=[adapter])
            merged = model.merge_and_unload(safe_merge=False)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise refused(error, "lora.merge", _NOT_MERGED) from error
    ties.tie(merged, together)
    partitions.split(merged, like=merged)  # PEFT's copies of modules to save are whole
    if tied and ties.are_apart(tied, merged):
        ties.say_untied(merged)
    # What was said of the adapter holds no more: there is none.
    ctx.newly_initialised.clear()
    ctx.changed_base.clear()
    ctx.newly_initialised.update(dict.fromkeys(repeated, "a copy for a repeated layer"))
    if request.section.adapter == ctx.section(LoraSection).adapter:
        ctx.record("lora", {"merged": True})
    merged.requires_grad_(False)
    return merged.eval()


def _named(changed: list[nn.Parameter], model: nn.Module) -> dict[str, str]:
    """Return the names in ``model`` of the weights that an adapter was added to -> why."""
    ids = {id(parameter) for parameter in changed}
    named = model.named_parameters(remove_duplicate=False)
    return {name: "an adapter is merged into it" for name, p in named if id(p) in ids}


def _account(
    ctx: LoadContext,
    request: Request,
    model: PeftModel,
    before: Mapping[int, torch.Tensor],
    untied: Mapping[str, torch.Tensor],
) -> None:
    """List what is not from the checkpoint; ``before`` holds the base's tensors by identity."""
    source = request.section.adapter
    made = f"resumed from {source}" if source else "made by PEFT"
    copies = {id(tensor) for tensor in untied.values()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in copies:
            ctx.newly_initialised[name] = "an untied copy"
        elif id(tensor) not in before:
            ctx.newly_initialised[name] = made


def _config(ctx: LoadContext, request: Request, model: nn.Module, **changes: Any) -> LoraConfig:
    """Make PEFT's configuration for this model."""
    if request.coati is not None:
        changes["target_modules"] = request.coati.targets(model)
        if not changes["target_modules"]:
            raise RequestError(
                Problem(
                    where="lora.lora_config",
                    message=f"no linear or embedding layer of {type(model).__name__} is named in"
                    f" its target_modules {list(request.coati.target_modules or ())}",
                    fix="Name layers as ColossalChat does, such as q_proj; it does not adapt"
                    " transformers' Conv1D.",
                )
            )
    needs_values = request.initialisation in _NEED_VALUES or (
        request.initialisation == "olora" and is_quantised(model)
    )
    # What is resumed is written over, and PEFT would make orthogonal factors of the codes' dtype.
    coded = request.initialisation == "orthogonal" and is_quantised(model)
    if (ctx.rehearsing and needs_values) or (request.saved is not None and coded):
        changes["init_lora_weights"] = True
    config = request.config(**changes)
    try:
        translate_targets(config, model)
    except ValueError as error:
        raise refused(error) from error
    return config


def _wrap(ctx: LoadContext, request: Request, model: nn.Module, config: LoraConfig) -> PeftModel:
    section = request.section
    if ctx.rehearsing and config.to_dict().get("monteclora_config") is not None:
        # Its samplers are made on a real device only; the host then promises nothing.
        raise NotImplementedError("PEFT cannot make MonteCLoRA on the meta device")
    if not ctx.rehearsing:
        _prepare(config, model)
    dispatcher = Dispatcher(ctx, config)
    try:
        # Made on the meta device, the adapter costs no memory and draws no random number.
        with (
            asked_once_imported(),
            _without_values(ctx) if ctx.rehearsing else gathering(model),
        ):
            wrapped = peft.get_peft_model(
                model,
                config,
                adapter_name=section.adapter_name,
                autocast_adapter_dtype=section.adapter_dtype == "auto",
            )
    except (ImportError, LookupError, TypeError, ValueError) as error:
        raise refused(error) from error
    dispatcher.finish(wrapped)
    _name_base(ctx, request, config)
    return wrapped


@contextmanager
def _without_values(ctx: LoadContext) -> Iterator[None]:
    with torch.device("meta"), dequantised_by_shape(ctx.dtype):
        yield


def _prepare(config: LoraConfig, model: nn.Module) -> None:
    """Do what an initialisation needs done first, and make sure of what a plugin was to do."""
    if config.init_lora_weights == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        if not any(hasattr(module, "eigens") for module in model.modules()):
            preprocess_corda(model, config)
    elif config.init_lora_weights == "lora_ga" and not any(
        # PEFT would quietly fall back to its default.
        hasattr(module, "_peft_loraga_grad")
        for module in model.modules()
    ):
        raise RequestError(
            Problem(
                where="lora.init_lora_weights",
                message="no layer carries the gradients that 'lora_ga' starts from",
                fix="Let a plugin's post_load call peft's preprocess_loraga.",
            )
        )


def _name_base(ctx: LoadContext, request: Request, config: LoraConfig) -> None:
    """Let the saved adapter find its base: PEFT knows only the folder the model was read from."""
    from pathlib import Path

    spec = ctx.spec
    if spec.weights == "pretrained" and not Path(spec.model).expanduser().is_dir():
        config.base_model_name_or_path = spec.model
    config.revision = spec.revision
    for name in ("base_model_name_or_path", "revision"):
        if request.fields.get(name) is not None:
            setattr(config, name, request.fields[name])


def _set_dtype(ctx: LoadContext, request: Request, model: PeftModel) -> None:
    """Cast the adapter to the dtype asked for; ``auto`` was PEFT's own work."""
    asked, adapter = request.section.adapter_dtype, request.section.adapter_name
    if asked == "auto":
        return
    dtype = ctx.dtype if asked == "base" else getattr(torch, asked)
    for layer in lora_layers(model, adapter).values():
        for parameter in adapter_parameters(layer, adapter).values():
            parameter.data = parameter.data.to(dtype)


def _trial(ctx: LoadContext, request: Request, model: nn.Module) -> set[str] | None:
    """Return the layers that the section's own words would adapt, where a saved adapter's hold.

    PEFT saves ``all-linear`` and regular expressions as the names they matched, so the words can
    only be compared by their effect; in the rehearsal a second wrap costs nothing.
    """
    given = request.section.given()
    words = {n: given[n] for n in ("target_modules", "exclude_modules") if n in given}
    if request.saved is None or not ctx.rehearsing or not words:
        return None
    twin = copy.deepcopy(model)
    with heard():
        wrapped = _wrap(ctx, request, twin, _config(ctx, request, twin, **words))
    return set(lora_layers(wrapped, request.section.adapter_name))


def _refuse_other_targets(request: Request, found: set[str], asked: set[str]) -> None:
    if asked == found:
        return
    raise RequestError(
        Problem(
            where="lora.target_modules",
            message=f"the section asks for {', '.join(targets.by_kind(asked))}, and the adapter in"
            f" {request.section.adapter!r} has {', '.join(targets.by_kind(found))}",
            fix="Remove `target_modules` and `exclude_modules` from the section.",
        )
    )
