"""What a spec says of a head: the three sections, plain data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from llmload import Section
from llmload.plugin import Dtype


class HeadSection(Section):
    """What every head has."""

    new: bool = False
    """Start with a new head. Otherwise the checkpoint must have one, and it is loaded."""
    trainable: bool = True
    """Whether the head requires gradients. LoRA freezes it unless it is in ``modules_to_save``."""
    dtype: Dtype | None = None
    """Dtype of the head's parameters; null for the model's, and for TRL's head float32."""


CoatiVersion = Literal["0.2.8", "0.3.4", "colossalchat"]
"""Generations of coati whose models differ in what they return."""


class ScoreSection(HeadSection):
    """What heads of DeepSpeed-Chat and of coati have besides; the other layouts do without."""

    num_padding_at_beginning: Annotated[int, Field(ge=0)] = 0
    """Pad tokens with which every sequence begins: 1 for OPT's tokenizer. DeepSpeed-Chat only."""
    compute_fp32_loss: bool = False
    """Compute the pairwise loss in float32. DeepSpeed-Chat only."""
    version: CoatiVersion = "colossalchat"
    """Which coati's model it is: ``colossalchat``, today's, with a reward for the last token and a
    value for each; ``0.3.4``, as from ColossalAI 0.3.3, reward and value for the last token;
    ``0.2.8``, as to 0.3.2, both the mean over tokens. coati only."""


class RewardHeadSection(ScoreSection):
    """A score for a whole sequence."""

    layout: Literal["deepspeed_chat", "coati", "sequence_classification"]
    """Whose model it is: ``deepspeed_chat`` its ``RewardModel``; ``coati`` its ``RewardModel``;
    ``sequence_classification`` transformers' own class with one label."""


class CriticHeadSection(ScoreSection):
    """A value for every token; with an old coati, for every sequence."""

    layout: Literal["deepspeed_chat", "coati"]
    """Whose model it is: ``deepspeed_chat`` its ``RewardModel``, of which step 3 asks
    ``forward_value``; ``coati`` its ``Critic``."""


class ValueHeadSection(HeadSection):
    """A value for every token beside the logits of the language model."""

    layout: Literal["trl"] = "trl"
    """Whose model it is: TRL's ``AutoModelForCausalLMWithValueHead``."""
    summary_dropout_prob: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Dropout before the head; null for the config's ``summary_dropout_prob``, without which it is
    0.1. TRL asks the config first."""
    v_head_init_strategy: Literal["normal"] | None = None
    """``normal``: weights from N(0, ``v_head_initializer_range``), bias zero; null: torch's own."""
    v_head_initializer_range: Annotated[float, Field(gt=0.0)] = 0.2
    """Standard deviation of new weights under ``normal``."""
