"""Gives a new adapter the weights of a saved one: every key, no other key, every shape."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from typing import TYPE_CHECKING, Final

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from llmload.builtin.lora.names import names_taken_as_they_are, translate_weights
from llmload.builtin.lora.request import heard
from llmload.plugin import WRAPPERS, CheckpointError, Problem, partitions, some, unwrapped

if TYPE_CHECKING:
    from peft import PeftModel

    from llmload.builtin.lora.saved import SavedAdapter
    from llmload.plugin import LoadContext

_PREFIX: Final = "base_model.model."
_NAMED: Final = re.compile(r"(\.lora_\w+)\.(?!weight$|bias$)([^.]+)(\.weight|\.bias)?$")
"""A key with the adapter's name, which PEFT leaves out of what it saves."""


def restore(ctx: LoadContext, saved: SavedAdapter, model: PeftModel, adapter: str) -> list[str]:
    """Copy the saved weights into ``model``, cast to the adapter's dtype.

    In the rehearsal only names and shapes are held against each other.

    :returns: names of base parameters that were saved with the adapter, and replaced by it.
    :raises CheckpointError: a key is missing or left over, or a shape differs.
    """
    known = allowed(model, adapter).keys()
    outline = translate_weights(model, saved.outline(), adapter, known)
    replaced = sorted(outline.keys() - required(model, adapter).keys())
    with partitions.whole(embeddings(model) if replaced else ()):
        problems = [*_mismatches(saved, model, adapter, outline)]
        if problems:
            raise CheckpointError(problems)
        if not ctx.rehearsing:
            values = translate_weights(model, saved.read(), adapter, known)
            with names_taken_as_they_are():
                set_peft_model_state_dict(model, values, adapter_name=adapter)
    return replaced


def embeddings(model: PeftModel) -> list[torch.Tensor]:
    """Return the base's parameters that PEFT may save with an adapter; partitioned under ZeRO-3."""
    base = model.get_base_model()
    modules = (base.get_input_embeddings(), base.get_output_embeddings())
    return [p for module in modules if module is not None for p in module.parameters()]


def required(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """Return the tensors that a saved adapter must hold, by their names in its file."""
    return _named(model, adapter, embeddings=False)


def allowed(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """Return those, and the embeddings, which PEFT saves too where they were resized or adapted."""
    return _named(model, adapter, embeddings=True) | required(model, adapter)


def _named(model: PeftModel, adapter: str, *, embeddings: bool) -> dict[str, torch.Tensor]:
    with heard():  # that biases have one dimension, for example
        tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(
            model, adapter_name=adapter, save_embedding_layers=embeddings
        )
    return tensors


def _mismatches(
    saved: SavedAdapter, model: PeftModel, adapter: str, found: Mapping[str, torch.Tensor]
) -> Iterator[Problem]:
    needed, known = required(model, adapter), allowed(model, adapter)
    missing = sorted(needed.keys() - found.keys())
    unexpected = sorted(found.keys() - known.keys())
    if missing:
        yield _problem(
            f"the adapter in {str(saved.folder)!r} lacks {some(missing)}",
            _how_keys_would_fit(found.keys(), needed.keys()),
        )
    if unexpected:
        yield _problem(
            f"the model has no place for {some(unexpected)} of the adapter in"
            f" {str(saved.folder)!r}",
            "Check that model and adapter belong together.",
        )
    for name in sorted(known.keys() & found.keys()):
        if found[name].shape != known[name].shape:
            yield _problem(
                f"{name!r} has the shape {list(found[name].shape)} in {str(saved.folder)!r} and"
                f" {list(known[name].shape)} in the model",
                _how_it_would_fit(saved, model, found[name].shape, known[name].shape),
            )


def _how_keys_would_fit(found: Set[str], needed: Set[str]) -> str:
    """Return by which rule or renaming an adapter's keys would have the names that are missing."""
    rules = [rule for rule in WRAPPERS if any(unwrapped(key, [rule]) != key for key in found)]
    if rules:
        return (
            f"Write `key_rules: [{', '.join(rules)}]`, which takes away what wrappers put into"
            " its keys."
        )
    names = {match[2] for key in found if (match := _NAMED.search(key))}
    renamings = {rf"(\.lora_\w+)\.{name}(?=\.|$)": r"\1" for name in sorted(names)}
    renamings["^"] = _PREFIX
    for pattern, replacement in renamings.items():
        if needed <= {re.sub(pattern, replacement, key) for key in found}:
            return f"Write `lora: {{key_map: {{'{pattern}': '{replacement}'}}}}`."
    if found and not needed & found:
        return (
            f"Its keys are {some(sorted(found))}: rename them with `lora: {{key_map: ...}}`, or"
            " check that model and adapter belong together."
        )
    return "Save it again, complete; or check that model and adapter belong together."


def _problem(message: str, fix: str) -> Problem:
    return Problem(where="lora.adapter", message=message, fix=fix)


def _how_it_would_fit(
    saved: SavedAdapter, model: PeftModel, stored: torch.Size, held: torch.Size
) -> str:
    """Say how head or embeddings get the adapter's size, where it is they that do not fit."""
    labels = getattr(model.get_base_model().config, "num_labels", None)
    classifies = saved.fields.get("task_type") in ("SEQ_CLS", "TOKEN_CLS")
    if classifies and held[0] == labels and stored[1:] == held[1:]:
        return f"Write `labels: {stored[0]}`, as many as the adapter was trained with."
    rows = partitions.shape(model.get_base_model().get_input_embeddings().weight)[0]
    if rows not in held or len(stored) != len(held) or stored[0] == held[0]:
        return (
            "Check that model and adapter belong together, and that the embeddings have the"
            " adapter's size."
        )
    return (
        "Give the embeddings the adapter's size before it is resumed: name the tokenizer that was"
        f" saved with it in `tokenizer: {{name_or_path: ...}}`, and write `embeddings: {{}}`, with"
        f" the `pad_to_multiple_of` of its training, for {stored[0]} rows. Plain PEFT needs"
        f" `resize_token_embeddings({stored[0]})` before it."
    )
