"""QLoRA on every causal language model of transformers: the losses of transformers and PEFT.

Run by ``nox -s kbit_architectures`` and not with the other tests, as it takes a quarter of an hour.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import architectures
import peft
import pytest
import torch
from quantised import load, plain
from test_architectures import NO_LORA
from test_kbit_architectures import EXCLUDED

from llmload.errors import LlmloadError
from llmload.testing import save_checkpoint

STEPS = 5
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"}
SECTIONS = pytest.mark.parametrize("section", [{"double_quant": True}, {"bits": 8}], ids=["4", "8"])
CANNOT = NO_LORA | {"gemma3n_text": "it clamps a weight in training, which codes cannot be"}
"""Types that PEFT or the model itself cannot train, each with the reason."""
TYPES = [name for name in architectures.causal_lm_types() if name not in EXCLUDED]

pytestmark = pytest.mark.filterwarnings("ignore")


@SECTIONS
@pytest.mark.parametrize("model_type", TYPES)
def test_five_losses_are_those_of_transformers_and_peft(
    model_type: str, section: dict[str, Any], tmp_path: Path
) -> None:
    model = architectures.build("causal_lm", model_type).bfloat16()
    folder = save_checkpoint(model, tmp_path / "folder")
    expected = _trained_by_peft(folder, section)
    if isinstance(expected, Exception):
        # PEFT or the model cannot, and we do not pretend otherwise.
        assert model_type in CANNOT, expected
        with pytest.raises((LlmloadError, AttributeError, RuntimeError, TypeError)):
            _trained_here(folder, section)
        return
    assert _trained_here(folder, section) == expected


def _trained_here(folder: Path, section: dict[str, Any]) -> tuple[list[str], list[float]]:
    torch.manual_seed(5)
    return _train(load(folder, section, lora=copy.deepcopy(LORA)).model)


def _trained_by_peft(
    folder: Path, section: dict[str, Any]
) -> tuple[list[str], list[float]] | Exception:
    # Before the load: what draws while a model is built is part of it.
    torch.manual_seed(5)
    base = plain(folder, section)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **copy.deepcopy(LORA))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _train(peft.get_peft_model(base, config))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return error


def _train(model: Any) -> tuple[list[str], list[float]]:
    """Return the names of what is trained and the loss of each step."""
    torch.manual_seed(11)
    model.train()
    model.config.use_cache = False
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    losses = []
    for _ in range(STEPS):
        outputs = model(**architectures.dummy_inputs(model, "causal_lm"))
        loss = outputs.logits.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return list(trainable), losses
