"""coati's reward models and critics, of three generations that differ in what they return.

Facts from ColossalAI 4f9953be3 (applications/ColossalChat), v0.3.4 and v0.2.8 (applications/Chat).
Files and parameters are alike in all of them.
"""

from __future__ import annotations

from typing import Any

import torch

from llmload_rlhf.models import HeadedModel


class CoatiModel(HeadedModel):
    """coati's transformer and head; what is returned is the subclasses' matter."""

    base_model_prefix = "model"
    head_attribute = "value_head"

    def _last_scores(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, **others: Any
    ) -> torch.Tensor:
        """Return scores, (rows,), at the last token that ``attention_mask`` has; all by default."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.model(input_ids, attention_mask=attention_mask, **others)[0]
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (attention_mask * columns).amax(-1)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return self.scores(hidden[rows, last])

    def _all_scores(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, **others: Any
    ) -> torch.Tensor:
        """Return scores, (rows, length)."""
        return self.scores(self.model(input_ids, attention_mask=attention_mask, **others)[0])


class RewardModel(CoatiModel):
    """``RewardModel`` as from ColossalAI 0.3.3: one score per sequence, taken at its last token."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any
    ) -> torch.Tensor:
        """Return scores, (rows,), at the last token that ``attention_mask`` has; all by default."""
        return self._last_scores(input_ids, attention_mask, **others)


class Critic(CoatiModel):
    """ColossalChat's ``Critic``: one value per token."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any
    ) -> torch.Tensor:
        """Return values, (rows, length)."""
        return self._all_scores(input_ids, attention_mask, **others)


class SequenceCritic(CoatiModel):
    """``Critic`` of ColossalAI 0.3.3 and 0.3.4: one value per sequence, taken at its last token."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any
    ) -> torch.Tensor:
        """Return values, (rows,), at the last token that ``attention_mask`` has; all by default."""
        return self._last_scores(input_ids, attention_mask, **others)


class MeanRewardModel(CoatiModel):
    """``RewardModel`` to ColossalAI 0.3.2: the mean of all tokens' scores but the last's."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any
    ) -> torch.Tensor:
        """Return scores, (rows,). Padding counts in the mean, as there."""
        return self._all_scores(input_ids, attention_mask, **others)[:, :-1].mean(1)


class MeanCritic(CoatiModel):
    """``Critic`` to ColossalAI 0.3.2 as its PPO script makes it, with ``use_action_mask``."""

    def forward(
        self,
        input_ids: torch.Tensor,
        action_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """Return values, (rows,): the mean over the prompt, or over all tokens but the last.

        :param action_mask: (rows, actions); with it the mean is that of the tokens before the
            actions, those that ``attention_mask`` has. Without it padding counts, as there.
        """
        values = self._all_scores(input_ids, attention_mask, **others)
        if action_mask is None:
            return values[:, :-1].mean(1)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        prompt = values.shape[1] - action_mask.shape[1]
        seen = attention_mask[:, :prompt]
        return (values[:, :prompt] * seen).sum(1) / (seen.sum(1) + 1e-8)
