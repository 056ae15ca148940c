"""Embeddings and heads that share one weight, and the adapter's choice of what to do with them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import peft
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from llmload.builtin.lora.layers import lora_layers, own_name, token_wrappers
from llmload.plugin import Problem, RequestError, partitions, some

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from llmload.builtin.lora.request import Request


def tied_embeddings(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules that share the weight of the input or output embeddings, by name.

    Empty where nothing is tied. A module that is used in two places is no tie: it gets one adapter.
    """
    try:
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):  # models without text have none
        return {}
    weights = [getattr(end, "weight", None) for end in ends]
    groups = [
        {
            name: module
            for name, module in model.named_modules()
            if any(held is weight for held in module._parameters.values())
        }
        for weight in weights
        if weight is not None
    ]
    return {name: module for group in groups if len(group) > 1 for name, module in group.items()}


def untie(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Give each module of a tied embedding a weight of its own, and say so in the config.

    A partitioned weight is gathered to be copied, and its copy is partitioned as the model is: all
    ranks must come here alike.

    :returns: the parameters that are copies now, by name.
    """
    owners: set[int] = set()
    copies = {}
    for name, module in tied_embeddings(model).items():
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        if id(weight) in owners:
            copies[f"{name}.weight"] = _own_copy(module, "weight", like=model)
        owners.add(id(weight))
    say_untied(model)
    return copies


def _own_copy(module: nn.Module, attribute: str, *, like: nn.Module) -> nn.Parameter:
    """Replace a module's parameter by a copy of it, in parts where it was."""
    shared = module._parameters[attribute]
    assert shared is not None
    with partitions.whole([shared]):
        copy = nn.Parameter(shared.detach().clone(), shared.requires_grad)
    setattr(module, attribute, copy)
    partitions.split(module, like=like)
    return copy


def say_untied(model: PreTrainedModel) -> None:
    """Write into the config, and where transformers 5 keeps a list, that nothing is tied."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


def reached(model: PeftModel, tied: dict[str, nn.Module]) -> list[str]:
    """Return the tied modules that the adapter wraps or copies."""
    inner = set()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            inner.add(id(module.get_base_layer()))
        elif isinstance(module, ModulesToSaveWrapper):
            inner.add(id(module.original_module))
    return [name for name, module in tied.items() if id(module) in inner]


def refuse_undecided(request: Request, reached: list[str], tied: dict[str, nn.Module]) -> None:
    """Refuse an adapter on tied weights without a choice, or with one that PEFT cannot carry out.

    :raises RequestError: says which choices there are.
    """
    if not reached:
        return
    section = request.section
    others = [name for name in tied if name not in reached] or reached[1:]
    if section.tied_weights is None and not section.ensure_weight_tying:
        together = (
            "`ensure_weight_tying: true` for one adapter for all of them, "
            if hasattr(peft.LoraConfig, "ensure_weight_tying")  # since peft 0.18
            else ""
        )
        raise RequestError(
            Problem(
                where="lora.tied_weights",
                message=f"the adapter reaches {reached[0]!r}, whose weight is also that of"
                f" {' and '.join(map(repr, others))}",
                fix=f"Choose {together}`tied_weights: separate` to adapt only what is named, or"
                " `tied_weights: untie` to give each a weight of its own.",
            )
        )
    if section.ensure_weight_tying and len(reached) < len(tied):
        raise RequestError(
            Problem(
                where="lora.ensure_weight_tying",
                message=f"PEFT cannot tie the adapter of {reached[0]!r} to"
                f" {' and '.join(map(repr, others))}: it ties what is called embed_tokens and"
                " lm_head",
                fix="Choose `tied_weights: separate` to adapt only what is named, or"
                " `tied_weights: untie` to give each a weight of its own.",
            )
        )
    if request.changes_base:
        raise RequestError(
            Problem(
                where="lora.init_lora_weights",
                message=f"{request.changes_base} changes the weight of {reached[0]!r}, which is"
                f" also that of {' and '.join(map(repr, others))}",
                fix="Set `tied_weights: untie`, or exclude it from the targets.",
            )
        )


def tie_again(model: PeftModel, adapter: str) -> list[str]:
    """Share the storage of tied adapters anew; return the layers that have one of another's.

    PEFT makes the head's A the transpose of the embedding's B, and likewise B of A, as views of one
    storage, and parts them again where it casts them (0.21.2, base in bfloat16 or float16).
    """
    source = model.get_base_model().get_input_embeddings()
    tied: list[str] = []
    if not isinstance(source, LoraLayer):
        return tied
    for name, layer in lora_layers(model, adapter).items():
        if layer is not source and layer.get_base_layer().weight is source.get_base_layer().weight:
            for mine, its in (("lora_A", "lora_embedding_B"), ("lora_B", "lora_embedding_A")):
                parameter = getattr(layer, mine)[adapter].weight
                parameter.data = getattr(source, its)[adapter].data.t()
            tied.append(name)
    return tied


def refuse_parted(by: str | None, tied: list[str]) -> None:
    """Refuse tied adapters where each rank is to keep a part of every parameter.

    :param by: the plugin that splits parameters.
    :raises RequestError: there are some. DeepSpeed 0.19 fails over the transposed view
        (``stride(-1) must be 1``), and of two orientations the parts would not be the same.
    """
    if tied:
        raise RequestError(
            f"`{by}` keeps a part of each parameter on each rank, and the adapter of"
            f" {some(tied)} is a transposed view of the embedding's, whose parts are others",
            fix="Write `tied_weights: separate` or `untie` in its place, or name the embedding in"
            " `modules_to_save`.",
            where="lora.ensure_weight_tying",
        )


# --- trained rows -------------------------------------------------------------------------------


def rows_trained_together(model: PeftModel) -> list[str]:
    """Return the modules whose trained rows PEFT has tied to those of another one."""
    return [
        own_name(name)
        for name, wrapper in token_wrappers(model)
        if wrapper.token_adapter.tied_adapter is not None
    ]


def refuse_rows_apart(request: Request, model: PeftModel, tied: Collection[str]) -> None:
    """Refuse a choice for tied weights that PEFT does not carry out for trained rows.

    :param tied: names of the modules that share one weight.
    :raises RequestError: names the modules.
    """
    rows = sorted({own_name(n) for n, _ in token_wrappers(model.get_base_model())} & set(tied))
    together = rows_trained_together(model)
    if together and request.section.tied_weights == "separate":
        raise RequestError(
            Problem(
                where="lora.tied_weights",
                message="`separate` is asked for, and PEFT trains the rows of"
                f" `trainable_token_indices` in {' and '.join(map(repr, together))} too, whose"
                " weight is the embedding's",
                fix="Remove `tied_weights` to train them together, or choose `untie`.",
            )
        )
    if rows and not together and request.section.ensure_weight_tying:
        raise RequestError(
            Problem(
                where="lora.ensure_weight_tying",
                message=f"PEFT trains rows of {' and '.join(map(repr, rows))} alone: it ties only"
                " those of the input embedding to others",
                fix="Name token ids without a module in `trainable_token_indices`, or choose"
                " `tied_weights`.",
            )
        )


def refuse_rows_untied(request: Request, model: PeftModel, untied: Collection[str]) -> None:
    """Refuse to untie the embedding for a saved adapter whose rows PEFT trained in the head too.

    :param untied: names of the modules that have been given weights of their own.
    :raises RequestError: says which they are.
    """
    if request.saved is None or request.saved.untied or not untied:
        return
    rows = [own_name(name) for name, _ in token_wrappers(model.get_base_model())]
    others = sorted({name.rpartition(".")[0] for name in untied})
    if rows and not set(rows) & set(others):
        raise RequestError(
            Problem(
                where="lora.tied_weights",
                message=f"`untie` is asked for, and the adapter in {request.section.adapter!r} was"
                f" trained on one weight: its rows are those of {' and '.join(map(repr, others))}"
                " too",
                fix="Remove `tied_weights` from the section.",
            )
        )


# --- merging ------------------------------------------------------------------------------------


def part_repeated_layers(model: PeftModel) -> list[str]:
    """Give layers that are repeated (`layer_replication`) weights of their own.

    PEFT lets them share one and adapts each: merged, it would get all their adapters.

    :returns: the names that the copies will have in the merged model.
    """
    base = model.get_base_model()
    tied = {id(module.weight) for module in tied_embeddings(base).values()}
    seen: set[int] = set()
    copied = []
    for path, module in base.named_modules():
        for attribute, parameter in [*module.named_parameters(recurse=False)]:
            if id(parameter) in seen - tied:
                _own_copy(module, attribute, like=base)
                copied.append(own_name(f"{path}.{attribute}"))
            seen.add(id(parameter))
    return copied


def together_when_merged(request: Request, model: PeftModel) -> list[str]:
    """Return the modules that must share one weight after a merge, which PEFT changes for each.

    They get weights of their own to be merged into; :func:`tie` then ties them again.

    :raises RequestError: the adapter changes a weight for some of the modules that have it, or for
        each otherwise.
    """
    base = model.get_base_model()
    replaced = {
        id(inner)
        for module in base.modules()
        if isinstance(module, ModulesToSaveWrapper)
        for inner in module.original_module.modules()
    }
    holders: dict[int, dict[str, nn.Module]] = {}
    for name, module in base.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(module) not in replaced:
                holders.setdefault(id(parameter), {})[own_name(name)] = module
    adapted = {
        id(layer.get_base_layer())
        for layer in lora_layers(model, request.section.adapter_name).values()
    }
    together: list[str] = []
    for changed in _changed_by_merging(model, request.section.adapter_name):
        found = holders.get(id(changed), {})
        if len(found) < 2 or set(found) <= set(together):
            continue
        same = all(id(module) in adapted for module in found.values())
        if not (same and request.section.ensure_weight_tying):
            raise RequestError(_unmergeable([*found]))
        for module in [*found.values()][1:]:
            _own_copy(module, "weight", like=base)
        together += found
    return together


def _changed_by_merging(model: PeftModel, adapter: str) -> Iterator[nn.Parameter]:
    """Yield the base's parameters that a merge writes, apart from rows that are tied by PEFT."""
    for layer in lora_layers(model, adapter).values():
        yield from layer.get_base_layer().parameters(recurse=False)
    wrappers = [*token_wrappers(model)]
    if not rows_trained_together(model):
        for _, wrapper in wrappers:
            yield wrapper.token_adapter.get_base_layer().weight


def _unmergeable(names: list[str]) -> Problem:
    return Problem(
        where="lora.merge",
        message=f"{' and '.join(map(repr, names))} have one weight, and the adapter changes it"
        " otherwise for each: no merged model with one weight is equal to what was trained",
        fix="Set `tied_weights: untie`, so that each has a weight of its own.",
    )


def tie(model: PreTrainedModel, names: list[str]) -> None:
    """Let modules of a merged model have the first one's weight again, as the config says.

    PEFT finds them apart and changes the config.
    """
    if names:
        model.config.tie_word_embeddings = True
    for name in names[1:]:
        model.get_submodule(name).weight = model.get_submodule(names[0]).weight


def are_apart(tied: dict[str, nn.Module], model: PreTrainedModel) -> bool:
    """Say whether modules that were tied before the adapter have weights of their own now."""
    return len({id(model.get_submodule(name).weight) for name in tied}) > 1
