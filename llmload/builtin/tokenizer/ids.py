"""Special-token ids as the tokenizer and as the model's configs know them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """One id of one config that is not what the tokenizer says."""

    holder: Any
    """The config or generation config."""
    place: str
    """``config`` (the text config) or ``generation_config``, with the attribute."""
    attribute: str
    """``pad_token_id``, ``bos_token_id``, ``eos_token_id`` or a further one."""
    found: int | list[int] | None
    """What it is."""
    wanted: int | list[int]
    """What it has to be."""


def misfits(
    model: Any, tokenizer: PreTrainedTokenizerBase, *, eos_config_fields: Sequence[str] = ()
) -> Iterator[Misfit]:
    """Compare the ids in the text config and in ``generation_config`` with the tokenizer's.

    The rules are those of transformers' Trainer. Only tokens that the tokenizer has count: where it
    has no bos token, the configs keep theirs. A list of eos ids is kept and the tokenizer's is put
    in front if it is missing. ``generation_config`` keeps a differing eos as a second one: each of
    them ends a text. Each of ``eos_config_fields`` holds the tokenizer's eos id in the text config.
    """
    for path, holder in _holders(model):
        for attribute in ("pad_token_id", "bos_token_id", "eos_token_id"):
            token_id = getattr(tokenizer, attribute)
            if token_id is None:
                continue
            found = getattr(holder, attribute, None)
            wanted = token_id
            if attribute == "eos_token_id" and isinstance(found, list):
                wanted = found if token_id in found else [token_id, *found]
            elif attribute == "eos_token_id" and path == "generation_config" and found is not None:
                wanted = found if found == token_id else [token_id, found]
            if found != wanted:
                yield Misfit(
                    holder=holder,
                    place=f"{path}.{attribute}",
                    attribute=attribute,
                    found=found,
                    wanted=wanted,
                )
        for attribute in eos_config_fields if path == "config" else ():
            found = getattr(holder, attribute, None)
            if found != tokenizer.eos_token_id:
                yield Misfit(
                    holder=holder,
                    place=f"{path}.{attribute}",
                    attribute=attribute,
                    found=found,
                    wanted=tokenizer.eos_token_id,
                )


def _holders(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the configs that speak of text: of a composite model not the outer one."""
    config = getattr(model, "config", None)
    if config is not None:
        yield "config", config.get_text_config()
    if getattr(model, "generation_config", None) is not None:
        yield "generation_config", model.generation_config
