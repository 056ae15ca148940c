"""The spec key ``dropout``."""

from __future__ import annotations

from pydantic import Field

from llmload.builtin.dropout.spellings import SPELLINGS
from llmload.plugin import Section


class DropoutSection(Section):
    """Dropout of the base model; an adapter's is its own (``lora.lora_dropout``)."""

    spellings = SPELLINGS

    p: float = Field(default=0.0, ge=0.0, lt=1.0)
    """The rate of every dropout. With 0 the model computes the same in training as in evaluation:
    LayerDrop, stochastic depth, router jitter and SpecAugment are off too."""
