"""The layouts as data: what each system calls its parts in files, and how it starts a head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from llmload import LoadContext
    from llmload_rlhf.sections import HeadSection

LANGUAGE_MODEL_HEADS = ("lm_head.", "embed_out.", "output.")
"""Keys of a causal model's checkpoint that a model without its head leaves out."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A transformer, wrapped with a head."""

    auto_class: str
    """What the wrapped model must be, as in the spec."""
    prefix: str
    """Goes before the transformer's keys in the system's files; they load without it too."""
    head: str
    """Goes before the head's keys in the system's files, and its attribute in the model."""
    parts: tuple[str, ...]
    """The head's parameters below it."""
    make_head: Callable[[Any, Any], nn.Module]
    """Takes the transformer's config and the section; returns a new head."""
    make_model: Callable[[LoadContext, PreTrainedModel, nn.Module, Any], nn.Module]
    """Takes the load, the transformer, the head and the section; returns the model."""
    dtype: str | None = None
    """Dtype of the system's head, whatever the transformer's; None where it has the same."""

    @property
    def head_keys(self) -> dict[str, str]:
        """Parameter of the head -> its key in the file and its name in the model."""
        return {part: f"{self.head}.{part}" for part in self.parts}


def _linear(config: Any, section: HeadSection) -> nn.Module:
    from torch import nn

    from llmload_rlhf.models import head_size

    return nn.Linear(head_size(config), 1)


def _linear_without_bias(config: Any, section: HeadSection) -> nn.Module:
    from torch import nn

    from llmload_rlhf.models import head_size

    return nn.Linear(head_size(config), 1, bias=False)


def _coati_reward_head(config: Any, section: HeadSection) -> nn.Module:
    """Make a linear layer with weights from N(0, 1 / (size + 1)), the second the deviation."""
    from torch import nn

    from llmload_rlhf.models import head_size

    size = head_size(config)
    head = nn.Linear(size, 1)
    _draw(head.weight, 1 / (size + 1))
    return head


def _trl_head(config: Any, section: Any) -> nn.Module:
    from llmload_rlhf.models import ValueHead, head_size

    dropout = section.summary_dropout_prob
    if dropout is None:
        dropout = getattr(config, "summary_dropout_prob", 0.1)
    head = ValueHead(head_size(config), dropout)
    if section.v_head_init_strategy == "normal":
        _draw(head.summary.weight, section.v_head_initializer_range)
        head.summary.bias.data.zero_()
    return head


def _draw(weight: torch.Tensor, deviation: float) -> None:
    import torch

    with torch.no_grad():
        weight.normal_(mean=0.0, std=deviation)


def _deepspeed_chat(ctx: LoadContext, base: Any, head: nn.Module, section: Any) -> nn.Module:
    from llmload_rlhf.chat_model import DeepSpeedChatModel

    return DeepSpeedChatModel(
        base,
        head,
        pad_id=pad_id(ctx, base.config),
        num_padding_at_beginning=section.num_padding_at_beginning,
        compute_fp32_loss=section.compute_fp32_loss,
    )


def pad_id(ctx: LoadContext, config: Any) -> Any:
    """Return the tokenizer's pad token id, else the config's, else None."""
    found = ctx.tokenizer.pad_token_id if ctx.tokenizer is not None else None
    return getattr(config, "pad_token_id", None) if found is None else found


def _coati_reward(ctx: LoadContext, base: Any, head: nn.Module, section: Any) -> nn.Module:
    from llmload_rlhf import coati_models

    mean = section.version == "0.2.8"
    kind = coati_models.MeanRewardModel if mean else coati_models.RewardModel
    return kind(base, head)


def _coati_critic(ctx: LoadContext, base: Any, head: nn.Module, section: Any) -> nn.Module:
    from llmload_rlhf import coati_models

    kinds = {"0.2.8": coati_models.MeanCritic, "0.3.4": coati_models.SequenceCritic}
    return kinds.get(section.version, coati_models.Critic)(base, head)


def _trl(ctx: LoadContext, base: Any, head: nn.Module, section: Any) -> nn.Module:
    from llmload_rlhf.models import TrlModel

    return TrlModel(base, head)


DEEPSPEED_CHAT = Layout(
    auto_class="base",
    prefix="rwtransformer.",
    head="v_head",
    parts=("weight",),
    make_head=_linear_without_bias,
    make_model=_deepspeed_chat,
)
COATI_REWARD = Layout(
    auto_class="base",
    prefix="model.",
    head="value_head",
    parts=("weight", "bias"),
    make_head=_coati_reward_head,
    make_model=_coati_reward,
)
COATI_CRITIC = Layout(
    auto_class="base",
    prefix="model.",
    head="value_head",
    parts=("weight", "bias"),
    make_head=_linear,
    make_model=_coati_critic,
)
TRL = Layout(
    auto_class="causal_lm",
    prefix="pretrained_model.",
    head="v_head",
    parts=("summary.weight", "summary.bias"),
    make_head=_trl_head,
    make_model=_trl,
    dtype="float32",
)
