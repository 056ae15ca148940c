"""What other tools call the keys of the section ``zero3``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from llmload.plugin import Spelling

SPELLINGS: Final[Mapping[str, Spelling]] = {
    "deepspeed": Spelling("transformers, axolotl and LLaMA-Factory", "zero3.config"),
    "ds_config": Spelling("DeepSpeed-Chat", "zero3.config"),
    "zero_stage": Spelling("DeepSpeed-Chat", "zero3.stage"),
}
