"""Words that a spec and the sections of plugins have in common."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal, NamedTuple, TypeAlias

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
"""In which a parameter can be held and trained."""


class AutoClass(NamedTuple):
    """What a word of ``auto_class`` is called elsewhere."""

    transformers: str
    """The auto class that chooses the concrete one."""
    peft: str | None
    """PEFT's ``task_type``; None where it has none."""


AUTO_CLASSES: Final[Mapping[str, AutoClass]] = MappingProxyType(
    {
        "causal_lm": AutoClass("AutoModelForCausalLM", "CAUSAL_LM"),
        "seq2seq_lm": AutoClass("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
        "sequence_classification": AutoClass("AutoModelForSequenceClassification", "SEQ_CLS"),
        "token_classification": AutoClass("AutoModelForTokenClassification", "TOKEN_CLS"),
        "image_text_to_text": AutoClass("AutoModelForImageTextToText", None),
        "base": AutoClass("AutoModel", "FEATURE_EXTRACTION"),
    }
)
"""The words of ``auto_class``, beside which it takes a class by its path."""
