"""DeepSpeed-Chat's model: pairs compared in training, values and end scores in its third step.

Facts from DeepSpeedExamples 45b4b715 (applications/DeepSpeed-Chat/dschat/utils/model).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmload_rlhf.models import HeadedModel


class DeepSpeedChatModel(HeadedModel):
    """DeepSpeed-Chat's ``RewardModel``: reward model of step 2, critic and reward model of step 3.

    Under ``compute_fp32_loss`` the loss, not the scores, is computed in float32. Other than
    upstream's, it leaves ``config.n_embd`` alone, hands ``position_ids`` on to the transformer and
    refuses a batch that is no batch of pairs. The loss is upstream's up to rounding.

    :param pad_id: the pad token's id, by which the end of each sequence is found.
    :param num_padding_at_beginning: pad tokens with which every sequence begins.
    """

    base_model_prefix = "rwtransformer"
    head_attribute = "v_head"
    rows_per_example = 2

    def __init__(
        self,
        base: PreTrainedModel,
        head: nn.Module,
        *,
        pad_id: int,
        num_padding_at_beginning: int = 0,
        compute_fp32_loss: bool = False,
    ) -> None:
        super().__init__(base, head)
        self.PAD_ID = pad_id
        self.num_padding_at_beginning = num_padding_at_beginning
        self.compute_fp32_loss = compute_fp32_loss

    def _values(self, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        given = {name: value for name, value in inputs.items() if value is not None}
        return self.scores(self.rwtransformer(input_ids, **given)[0])

    def _ends(self, ids: torch.Tensor, skipped: int) -> torch.Tensor:
        """Return where each row ends: at its pad token number ``skipped`` from 0, or at its end."""
        is_end = (ids == self.PAD_ID).cumsum(-1) == skipped + 1
        columns = torch.arange(ids.shape[-1], device=ids.device)
        return torch.where(is_end, columns, ids.shape[-1]).amin(-1)

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool = False,
        **others: Any,
    ) -> dict[str, torch.Tensor]:
        """Compare pairs: the first half of the rows are the chosen ones, the second the rejected.

        :param input_ids: (2 n, length).
        :param others: what else the transformer takes, as PEFT hands it on.
        :returns: ``loss``, a scalar: the mean of ``-logsigmoid(chosen - rejected)`` over the tokens
            from the first that differs to the longer one's end; ``chosen_mean_scores`` and
            ``rejected_mean_scores``, (n,): the scores of the last tokens.
        :raises ValueError: an odd number of rows, or a pair that differs in its first token.
        """
        rows, length = input_ids.shape
        if rows % 2 or not rows:
            raise ValueError(f"pairs are wanted: chosen, then rejected; found {rows} rows")
        values = self._values(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **others,
        )
        (chosen_ids, rejected_ids), (chosen, rejected) = input_ids.chunk(2), values.chunk(2)
        columns = torch.arange(length, device=input_ids.device)
        differs = chosen_ids != rejected_ids
        first = torch.where(differs, columns, length).amin(-1)
        if not first.is_meta and bool((first == 0).any()):
            raise ValueError("a pair differs in its first token: both must begin with a prompt")
        ends = self._ends(input_ids, self.num_padding_at_beginning)
        chosen_end, rejected_end = ends.chunk(2)
        # Of a pair that does not differ, upstream compares the last column.
        same = first == length
        start = torch.where(same, length - 1, first)
        stop = torch.where(same, length, torch.maximum(chosen_end, rejected_end))
        rejected_end = torch.where(same, chosen_end, rejected_end)
        inside = (columns >= start[:, None]) & (columns < stop[:, None])
        a, b = (chosen.float(), rejected.float()) if self.compute_fp32_loss else (chosen, rejected)
        each = -nn.functional.logsigmoid(a - b) * inside
        loss = (each.sum(-1) / inside.sum(-1)).mean()
        return {
            "loss": loss,
            "chosen_mean_scores": _at(chosen, chosen_end - 1),
            "rejected_mean_scores": _at(rejected, rejected_end - 1),
        }

    def forward_value(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        return_value_only: bool = False,
        prompt_length: int = 0,
        use_cache: bool = False,
        **others: Any,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the values of all tokens, and the scores at the ends of the answers.

        :param prompt_length: tokens of the prompt, padding included; an answer ends at the first
            pad token after it.
        :param others: what else the transformer takes, such as ``head_mask``.
        :returns: (rows, length) with ``return_value_only``; otherwise ``values``, the same, and
            ``chosen_end_scores``, (rows,).
        :raises ValueError: scores are asked for, and ``prompt_length`` is not above 1.
        """
        values = self._values(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **others,
        )
        if return_value_only:
            return values
        if prompt_length <= 1:
            raise ValueError(f"prompt_length must be above 1, found {prompt_length}")
        ends = prompt_length + self._ends(input_ids[:, prompt_length:], 0)
        return {"values": values, "chosen_end_scores": _at(values, ends - 1)}


def _at(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return one value of each row; column -1 is the last, as in Python."""
    return values.gather(1, columns[:, None] % values.shape[1]).squeeze(1)
