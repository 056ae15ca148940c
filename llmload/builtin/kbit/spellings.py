"""What other tools call the keys of the section ``kbit``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from llmload.plugin import DTYPE_WORDS, Keys, Sentence, Spelling, switch, words


def _bits(value: object) -> object:
    return value if value in (4, 8) else Sentence("Write `kbit: {bits: 4}` or `kbit: {bits: 8}`.")


_BNB: Final = {
    "bnb_4bit_compute_dtype": "compute_dtype",
    "bnb_4bit_quant_storage": "quant_storage",
    "bnb_4bit_quant_type": "quant_type",
    "bnb_4bit_use_double_quant": "double_quant",
    "llm_int8_threshold": "threshold",
}
"""What ``BitsAndBytesConfig`` calls our keys."""


def _settings(value: object) -> object:
    """Keys of ``BitsAndBytesConfig`` beside the number of bits."""
    if not isinstance(value, Mapping) or not value.keys() <= _BNB.keys():
        return Sentence("Write its settings into `kbit`.")
    ours = words(DTYPE_WORDS)
    return Keys({"kbit": {_BNB[key]: ours(part) for key, part in value.items()}})


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
    "bnb_config_kwargs": Spelling("axolotl", "kbit", _settings),
}
