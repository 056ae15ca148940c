"""Embeddings and heads that share one weight, and the adapter's choice of what to do with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import peft
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from llmload import Problem, RequestError
from llmload.builtin.lora.layers import lora_layers

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

    :returns: the parameters that are copies now, by name.
    """
    owners: set[int] = set()
    copies = {}
    for name, module in tied_embeddings(model).items():
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        if id(weight) in owners:
            module.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            copies[f"{name}.weight"] = module.weight
        owners.add(id(weight))
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):  # transformers 5 keeps a list
        model.all_tied_weights_keys = {}
    return copies


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


def tie_again(model: PeftModel, adapter: str) -> None:
    """Share the storage of tied adapters anew.

    PEFT makes the head's A the transpose of the embedding's B, and likewise B of A, as views of one
    storage, and parts them again where it casts them (0.21.2, base in bfloat16 or float16).
    """
    source = model.get_base_model().get_input_embeddings()
    if not isinstance(source, LoraLayer):
        return
    for layer in lora_layers(model, adapter).values():
        if layer is not source and layer.get_base_layer().weight is source.get_base_layer().weight:
            for mine, its in (("lora_A", "lora_embedding_B"), ("lora_B", "lora_embedding_A")):
                parameter = getattr(layer, mine)[adapter].weight
                parameter.data = getattr(source, its)[adapter].data.t()
