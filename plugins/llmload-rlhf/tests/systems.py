"""The seed systems told anew, slowly and row by row, from what is known of their code.

DeepSpeedExamples 45b4b715 (dschat/utils/model/reward_model.py), ColossalAI 4f9953be3, v0.3.4
and v0.2.8 (coati/models) and TRL 0.11.4 (models/modeling_value_head.py). Nothing here is ours:
plain torch and transformers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def width(config: Any) -> int:
    if hasattr(config, "word_embed_proj_dim"):
        return config.word_embed_proj_dim
    return config.hidden_size if hasattr(config, "hidden_size") else config.n_embd


class ChatRewardModel(nn.Module):
    """DeepSpeed-Chat's."""

    def __init__(self, base: Any, pad: int, skipped: int = 0, fp32: bool = False) -> None:
        super().__init__()
        self.v_head = nn.Linear(width(base.config), 1, bias=False)
        self.rwtransformer = base
        self.pad, self.skipped, self.fp32 = pad, skipped, fp32

    def score(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.v_head(self.rwtransformer(ids, attention_mask=mask)[0]).squeeze(-1)

    def pairs(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        rewards = self.score(ids, mask)
        half, length = len(ids) // 2, ids.shape[1]
        losses, of_chosen, of_rejected = [], [], []
        for one in range(half):
            a, b = ids[one], ids[half + one]
            ra, rb = rewards[one], rewards[half + one]
            end_a = self.end(a, self.skipped, length)
            different = [i for i in range(length) if a[i] != b[i]]
            if different:
                end_b = self.end(b, self.skipped, length)
                start, stop = different[0], max(end_a, end_b)
            else:
                end_b, start, stop = end_a, length - 1, length
            assert start > 0
            of_chosen.append(ra[end_a - 1])
            of_rejected.append(rb[end_b - 1])
            margin_a, margin_b = ra[start:stop], rb[start:stop]
            if self.fp32:
                margin_a, margin_b = margin_a.float(), margin_b.float()
            losses.append(-functional.logsigmoid(margin_a - margin_b).mean())
        return {
            "loss": torch.stack(losses).mean(),
            "chosen_mean_scores": torch.stack(of_chosen),
            "rejected_mean_scores": torch.stack(of_rejected),
        }

    def end(self, row: torch.Tensor, skipped: int, otherwise: int) -> int:
        pads = [i for i, token in enumerate(row.tolist()) if token == self.pad]
        return pads[skipped] if len(pads) > skipped else otherwise

    def value(self, ids: torch.Tensor, mask: torch.Tensor, prompt: int) -> dict[str, Any]:
        values = self.score(ids, mask)
        ends = [prompt + self.end(row[prompt:], 0, ids.shape[1] - prompt) for row in ids]
        scores = [row[end - 1] for row, end in zip(values, ends, strict=True)]
        return {"values": values, "chosen_end_scores": torch.stack(scores)}


class CoatiRewardModel(nn.Module):
    """coati's; the critic's values with ``pooled=False``."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.model = base
        self.value_head = nn.Linear(width(base.config), 1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, pooled: bool = True) -> torch.Tensor:
        values = self.value_head(self.model(ids, attention_mask=mask)[0]).squeeze(-1)
        if not pooled:
            return values
        last = [max(i for i, seen in enumerate(row.tolist()) if seen) for row in mask]
        return torch.stack([row[i] for row, i in zip(values, last, strict=True)])


class OldCoati(CoatiRewardModel):
    """coati of v0.2.8, whose reward and value are means that pay padding no heed."""

    def reward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows = self(ids, mask, pooled=False)
        return torch.stack([row[: ids.shape[1] - 1].mean() for row in rows])

    def value(self, ids: torch.Tensor, actions: int, mask: torch.Tensor) -> torch.Tensor:
        """With ``use_action_mask``, as its train_prompts.py has it."""
        prompt = ids.shape[1] - actions
        rows = zip(self(ids, mask, pooled=False), mask, strict=True)
        found = [
            sum(value for value, seen in zip(row[:prompt], one[:prompt], strict=True) if seen)
            / one[:prompt].sum()
            for row, one in rows
        ]
        return torch.stack(found)


class TrlValueHead(nn.Module):
    """TRL's model with a value head, and the tensors of the file that it saves."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pretrained_model = model
        self.v_head = nn.Module()
        self.v_head.dropout = nn.Dropout(getattr(model.config, "summary_dropout_prob", 0.1))
        self.v_head.summary = nn.Linear(width(model.config), 1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.pretrained_model(ids, attention_mask=mask, output_hidden_states=True)
        dropped = self.v_head.dropout(outputs.hidden_states[-1])
        return outputs.logits.float(), self.v_head.summary(dropped.float()).squeeze(-1)

    def file(self) -> dict[str, torch.Tensor]:
        state = dict(self.pretrained_model.state_dict())
        return state | {f"v_head.{k}": v for k, v in self.v_head.state_dict().items()}


def base_of(model: Any) -> Any:
    return copy.deepcopy(model.base_model)
