"""ColossalChat's ``lora_config.json``, told in PEFT's words.

Read as ColossalAI 4f9953be3 reads it, except for what is a fault there: its linear layers take
``lora_alpha`` 32 and dropout 0 whatever the file says, and ``lora_train_bias: none`` throws the
pretrained biases away. Here the file's values hold, and biases stay. The layers are PEFT's, or with
the plugin ``coati`` ColossalChat's own.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field, ValidationError

from llmload.builtin.lora.section import Alpha, Names, Rank
from llmload.builtin.lora.spellings import SPELLINGS
from llmload.plugin import Problem, Section, SpecError, explain, local_path, read_file

if TYPE_CHECKING:
    from torch import nn

_BIAS: Final = {"none": "none", "all": "all", "lora": "lora_only"}
# coati's PiSSA is svd_lowrank with four iterations, which PEFT calls pissa_niter_4.
_INITIALISATION: Final = {"kaiming_uniform": True, "PiSSA": "pissa_niter_4"}


class CoatiLora(Section):
    """The file's keys with ColossalChat's defaults, the rank's apart."""

    r: Rank
    """Rank."""
    lora_alpha: Alpha = 32
    """The adapter's output is scaled by ``lora_alpha / r``."""
    linear_lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout on the input of adapted linear layers."""
    embedding_lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Applied neither by ColossalChat nor by PEFT."""
    lora_train_bias: Literal["none", "all", "lora"] = "none"
    """Biases that are trained too."""
    lora_initialization_method: Literal["kaiming_uniform", "PiSSA"] = "kaiming_uniform"
    """How the adapter starts."""
    target_modules: Names | None = None
    """Texts that contain the names of the layers to adapt; null for all."""

    def fields(self) -> dict[str, Any]:
        """Return the fields of ``LoraConfig`` that follow from the file, targets apart."""
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.linear_lora_dropout,
            "bias": _BIAS[self.lora_train_bias],
            "init_lora_weights": _INITIALISATION[self.lora_initialization_method],
        }

    def targets(self, model: nn.Module) -> list[str]:
        """Return the full names of the modules that ColossalChat would adapt.

        Linear and embedding layers whose own name, the last part, occurs anywhere in one of the
        texts: ``self_attn.q_proj`` is met by every ``q_proj``, and by a layer called ``proj``.
        """
        from torch import nn

        return [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Embedding)
            and (
                self.target_modules is None
                or any(name.rpartition(".")[2] in text for text in self.target_modules)
            )
        ]

    def notes(self, file: str) -> list[str]:
        """Return what the plan says of the file, corrected faults by name."""
        said = [
            f"{file} is read with its faults in ColossalChat corrected: lora_alpha"
            f" {self.lora_alpha} and linear_lora_dropout {self.linear_lora_dropout} hold for linear"
            " layers too (there always 32 and 0.0)"
        ]
        if self.lora_train_bias == "none":
            said[0] += ", and pretrained biases are kept (there they are dropped)"
        if self.embedding_lora_dropout:
            said.append(
                f"embedding_lora_dropout {self.embedding_lora_dropout} has no effect, as in"
                " ColossalChat: PEFT has no dropout on embeddings"
            )
        return said


def read(file: str) -> CoatiLora:
    """Read a ``lora_config.json``.

    :raises SpecError: the file cannot be read, is not a JSON object, or a key of it is wrong.
    """
    path = local_path(file, "lora.lora_config")
    if not path.exists():
        raise _refusal("the file does not exist", "Check the path.", file)
    try:
        content = json.loads(read_file(path, "lora.lora_config", "the file"))
    except (RecursionError, ValueError) as error:
        raise _refusal(f"the file is not JSON: {error}", "Check the file.", file) from None
    if not isinstance(content, dict):
        raise _refusal(
            f"expected a JSON object, found a {type(content).__name__}",
            "Give the lora_config.json of a ColossalChat run.",
            file,
        )
    # ColossalChat's default, which means no adapter there.
    content.setdefault("r", 0)
    try:
        return CoatiLora.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        problems = explain(error, CoatiLora, content, spellings=SPELLINGS)
        raise SpecError(p.model_copy(update={"file": file}) for p in problems) from None


def _refusal(message: str, fix: str, file: str) -> SpecError:
    return SpecError(Problem(where="lora.lora_config", file=file, message=message, fix=fix))
