"""The models: a transformer and a head on it, with names, outputs and files of their systems.

Facts from DeepSpeedExamples 45b4b715 (applications/DeepSpeed-Chat), ColossalAI 4f9953be3 and v0.3.4
(coati) and TRL 0.11.4 (trl/models/modeling_value_head.py; the class left TRL with v1.0).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from llmload import partitions


def head_size(config: Any) -> int:
    """Return the width of the transformer's output: OPT projects it, GPT-2 has ``n_embd``."""
    for name in ("word_embed_proj_dim", "hidden_size", "n_embd"):
        size = getattr(config, name, None)
        if size is not None:
            return int(size)
    raise AttributeError(f"the config of {config.model_type!r} names no hidden size")


class HeadedModel(PreTrainedModel):  # type: ignore[misc]
    """A transformer under the name ``base_model_prefix`` and a head under ``head_attribute``.

    :param base: the loaded transformer; its config becomes this model's own.
    :param head: the head, on the base's device.
    """

    head_attribute: ClassVar[str]
    supports_gradient_checkpointing = True
    # What the base runs with was settled when it was built.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, base: PreTrainedModel, head: nn.Module) -> None:
        super().__init__(base.config)
        prefix = self.base_model_prefix
        setattr(self, prefix, base)
        setattr(self, self.head_attribute, head)
        # What post_init gathers from children, without its initialisation of weights.
        tied = getattr(base, "all_tied_weights_keys", None)
        if tied is not None:
            self.all_tied_weights_keys = {f"{prefix}.{k}": f"{prefix}.{v}" for k, v in tied.items()}
        for name in ("_no_split_modules", "_keep_in_fp32_modules", "_skip_keys_device_placement"):
            setattr(self, name, getattr(base, name, None))
        self.train(base.training)

    @property
    def head(self) -> nn.Module:
        """The head."""
        return getattr(self, self.head_attribute)  # type: ignore[no-any-return]

    def get_input_embeddings(self) -> nn.Module:
        """Return the transformer's."""
        return self.base_model.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the transformer's."""
        self.base_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the transformer's, if it is a language model."""
        return self.base_model.get_output_embeddings()  # type: ignore[no-any-return]

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the head's output for hidden states, in the head's dtype, last axis gone."""
        return self.head(hidden.to(next(self.head.parameters()).dtype)).squeeze(-1)  # type: ignore[no-any-return]

    def save_pretrained(self, save_directory: Any, state_dict: Any = None, **others: Any) -> None:
        """Write the files that the model's system reads. All ranks must come here alike.

        :param save_directory: folder, made if need be.
        :param state_dict: as ``state_dict()`` gives it; by default the model's own.
        :param others: taken for the sake of callers that know transformers; without effect.
        """
        folder = Path(save_directory)
        state = whole_state(self) if state_dict is None else dict(state_dict)
        if _rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self._write(folder, state)

    def _write(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        """Write config and ``pytorch_model.bin``, the only file that the older systems read."""
        self.config.save_pretrained(folder)
        torch.save(state, folder / "pytorch_model.bin")


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict on rank 0, partitioned parameters whole; nothing on other ranks."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        partitioned = partitions.is_partitioned(tensor)
        with partitions.whole([tensor]):
            if _rank() == 0:
                value = tensor.detach().cpu()
                state[name] = value.clone() if partitioned else value
    return state


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


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


class CoatiRewardModel(HeadedModel):
    """coati's ``RewardModel``: one score per sequence, taken at its last token."""

    base_model_prefix = "model"
    head_attribute = "value_head"

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any
    ) -> torch.Tensor:
        """Return scores, (rows,), at the last token that ``attention_mask`` has; all by default."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.model(input_ids, attention_mask=attention_mask, **others)[0]
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (attention_mask * columns).amax(-1)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return self.scores(hidden[rows, last])


class CoatiCritic(HeadedModel):
    """coati's ``Critic``: one value per token."""

    base_model_prefix = "model"
    head_attribute = "value_head"

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any
    ) -> torch.Tensor:
        """Return values, (rows, length)."""
        return self.scores(self.model(input_ids, attention_mask=attention_mask, **others)[0])


class ValueHead(nn.Module):
    """TRL's ``ValueHead``: dropout, then a linear layer called ``summary``."""

    def __init__(self, size: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.summary = nn.Linear(size, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return (..., 1), in the head's dtype; what is dropped is dropped before the cast."""
        dropped = self.dropout(hidden)
        return self.summary(dropped.to(next(self.summary.parameters()).dtype))  # type: ignore[no-any-return]


class TrlModel(HeadedModel):
    """TRL's ``AutoModelForCausalLMWithValueHead``: the language model, and a value per token."""

    base_model_prefix = "pretrained_model"
    head_attribute = "v_head"

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        return_past_key_values: bool = False,
        **others: Any,
    ) -> tuple[Any, ...]:
        """Return logits in float32, loss or None, and values, (rows, length)."""
        outputs = self.pretrained_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **(others | {"output_hidden_states": True}),
        )
        value = self.v_head(outputs.hidden_states[-1]).squeeze(-1)
        found = (outputs.logits.float(), outputs.loss, value)
        return (*found, outputs.past_key_values) if return_past_key_values else found

    @classmethod
    def can_generate(cls) -> bool:
        """Say no to transformers, whose mixin it lacks: the language model within generates."""
        return False

    def generate(self, *args: Any, **options: Any) -> Any:
        """Generate with the language model."""
        return self.pretrained_model.generate(*args, **options)

    def prepare_inputs_for_generation(self, *args: Any, **options: Any) -> Any:
        """As the language model does; PEFT asks for it."""
        return self.pretrained_model.prepare_inputs_for_generation(*args, **options)

    def _write(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        """Write what TRL's ``save_pretrained`` does: the language model's file, head included."""
        prefix = f"{self.base_model_prefix}."
        plain = {name.removeprefix(prefix): value for name, value in state.items()}
        self.pretrained_model.save_pretrained(folder, state_dict=plain)
