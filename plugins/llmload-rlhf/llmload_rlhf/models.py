"""The models: a transformer and a head on it, with names, outputs and files of their systems.

Facts from DeepSpeedExamples 45b4b715 (applications/DeepSpeed-Chat) and TRL 0.11.4
(trl/models/modeling_value_head.py; the class left TRL with v1.0).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from llmload.plugin import partitions


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
        if past_key_values is not None:  # whose name transformers is about to change
            others["past_key_values"] = past_key_values
        outputs = self.pretrained_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
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
