"""What other tools call the keys of the section ``tokenizer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from llmload.plugin import Spelling, listed

_EXTRA_TOKENS: Final = "tokenizer.add_special_tokens.additional_special_tokens"

SPELLINGS: Final[Mapping[str, Spelling]] = {
    "pad_token": Spelling("TRL", "tokenizer.pad_token"),
    "eos_token": Spelling("TRL", "tokenizer.add_special_tokens.eos_token"),
    "padding_side": Spelling("transformers", "tokenizer.padding_side"),
    "chat_template": Spelling("axolotl", "tokenizer.chat_template"),
    "chat_template_path": Spelling("TRL", "tokenizer.chat_template"),
    "chat_template_jinja": Spelling("axolotl", "tokenizer.chat_template"),
    "tokens": Spelling("axolotl", "tokenizer.add_tokens"),
    "add_tokens": Spelling("LLaMA-Factory", "tokenizer.add_tokens", listed),
    "new_special_tokens": Spelling("LLaMA-Factory and ms-swift", _EXTRA_TOKENS, listed),
    "add_special_tokens": Spelling("LLaMA-Factory", _EXTRA_TOKENS, listed),
    "special_tokens": Spelling("axolotl", "tokenizer.add_special_tokens"),
    "use_fast_tokenizer": Spelling("LLaMA-Factory", "tokenizer.use_fast"),
    "tokenizer_use_fast": Spelling("axolotl", "tokenizer.use_fast"),
    "tokenizer_name_or_path": Spelling("the DPO reference code", "tokenizer.name_or_path"),
    "tokenizer_config": Spelling("axolotl", "tokenizer.name_or_path"),
}
