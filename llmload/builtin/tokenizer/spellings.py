"""What other tools call the keys of the section ``tokenizer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llmload.plugin import Keys, Removal, Sentence, Spelling, listed

_EXTRA_TOKENS: Final = "tokenizer.add_special_tokens.additional_special_tokens"

_SHORT: Final = 40


def _with_rows(section: Mapping[str, Any]) -> Keys:
    """Tokens that may be new need rows in the embedding."""
    return Keys({"tokenizer": section, "embeddings": {}})


def _tokens(value: object) -> object:
    return _with_rows({"add_tokens": listed(value)})


def _extra_tokens(value: object) -> object:
    return _with_rows({"add_special_tokens": {"additional_special_tokens": listed(value)}})


def _eos(value: object) -> object:
    return _with_rows({"add_special_tokens": {"eos_token": value}})


def _special_tokens(value: object) -> object:
    """Take the pad token apart, which has a key of its own, and may be new."""
    if not isinstance(value, Mapping):
        return _extra_tokens(value)
    named = {name: token for name, token in value.items() if token is not None}
    pad = named.pop("pad_token", None)
    section: dict[str, Any] = {"add_special_tokens": named} if named else {}
    if pad is not None:
        added = {"content": pad, "special": True}
        section |= {"add_tokens": [added], "pad_token": pad, "overwrite_pad": True}
    return _with_rows(section)


def _chat_template(value: object) -> object:
    """Names of templates that other tools bring along lead to none here."""
    if not isinstance(value, str) or value in ("tokenizer_default", "default"):
        return Removal.DEFAULT
    if any(mark in value for mark in ("{{", "{%", "/", ".")):
        return value
    name = repr(value) if len(value) < _SHORT else "it names"
    return Sentence(
        f"Save the template {name} to a file, and write `tokenizer: {{chat_template: FILE}}`:"
        " llmload brings no templates along."
    )


SPELLINGS: Final[Mapping[str, Spelling]] = {
    "pad_token": Spelling("TRL", "tokenizer.pad_token"),
    "eos_token": Spelling("TRL", "tokenizer.add_special_tokens.eos_token", _eos),
    "padding_side": Spelling("transformers", "tokenizer.padding_side"),
    "chat_template": Spelling("axolotl", "tokenizer.chat_template", _chat_template),
    "chat_template_path": Spelling("TRL", "tokenizer.chat_template", _chat_template),
    "chat_template_jinja": Spelling("axolotl", "tokenizer.chat_template", _chat_template),
    "tokens": Spelling("axolotl", "tokenizer.add_tokens", _tokens),
    "add_tokens": Spelling("LLaMA-Factory", "tokenizer.add_tokens", _tokens),
    "new_special_tokens": Spelling("LLaMA-Factory and ms-swift", _EXTRA_TOKENS, _extra_tokens),
    "add_special_tokens": Spelling("LLaMA-Factory", _EXTRA_TOKENS, _extra_tokens),
    "special_tokens": Spelling("axolotl", "tokenizer.add_special_tokens", _special_tokens),
    "use_fast_tokenizer": Spelling("LLaMA-Factory", "tokenizer.use_fast"),
    "tokenizer_use_fast": Spelling("axolotl", "tokenizer.use_fast"),
    "tokenizer_name_or_path": Spelling("the DPO reference code", "tokenizer.name_or_path"),
    "tokenizer_config": Spelling("axolotl", "tokenizer.name_or_path"),
}
