"""What other tools call the keys of the section ``kbit``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from llmload.plugin import DTYPE_WORDS, Sentence, Spelling, switch, words


def _bits(value: object) -> object:
    return value if value in (4, 8) else Sentence("Write `kbit: {bits: 4}` or `kbit: {bits: 8}`.")


SPELLINGS: Final[Mapping[str, Spelling]] = {
    "load_in_4bit": Spelling("transformers, TRL and axolotl", "kbit.bits", switch(4)),
    "load_in_8bit": Spelling("transformers, TRL and axolotl", "kbit.bits", switch(8)),
    "quantization_bit": Spelling("LLaMA-Factory", "kbit.bits", _bits),
    "quant_bits": Spelling("ms-swift", "kbit.bits", _bits),
    "quantization_type": Spelling("LLaMA-Factory", "kbit.quant_type"),
    "bnb_4bit_quant_type": Spelling("transformers and TRL", "kbit.quant_type"),
    "double_quantization": Spelling("LLaMA-Factory", "kbit.double_quant"),
    "use_bnb_nested_quant": Spelling("TRL", "kbit.double_quant"),
    "bnb_4bit_use_double_quant": Spelling("transformers and ms-swift", "kbit.double_quant"),
    "bnb_4bit_compute_dtype": Spelling(
        "transformers and ms-swift", "kbit.compute_dtype", words(DTYPE_WORDS)
    ),
    "bnb_4bit_quant_storage": Spelling(
        "transformers and TRL", "kbit.quant_storage", words(DTYPE_WORDS)
    ),
    "quantization_config": Spelling("transformers", instead="Write `kbit: {bits: 4}`."),
    "bnb_config_kwargs": Spelling("axolotl", instead="Write its settings into `kbit`."),
}
