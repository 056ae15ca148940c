"""Loads with an adapter, by llmload and by plain transformers and PEFT, for the lora tests."""

from __future__ import annotations

import copy
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version

import llmload
from llmload.testing import losses


def needs_peft(version: str) -> pytest.MarkDecorator:
    """Skip where the installed PEFT is older than the one that brought what the test is about."""
    installed = metadata.version("peft")
    return pytest.mark.skipif(
        Version(installed) < Version(version), reason=f"came with peft {version}"
    )


def load(folder: Path, lora: dict[str, Any], **core: Any) -> llmload.LoadResult:
    """Load ``folder`` with the section ``lora`` and any core keys."""
    return llmload.load({"model": str(folder), "lora": lora, **core})


def refusal(folder: Path, lora: dict[str, Any], **core: Any) -> str:
    """Return the errors of a plan that must fail, a line each."""
    with pytest.raises(llmload.RequestError) as caught:
        llmload.plan({"model": str(folder), "lora": lora, **core}).raise_for_errors()
    return str(caught.value)


def plain(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    autocast: bool = True,
    **config: Any,
) -> Any:
    """Load ``folder`` with transformers and wrap it with PEFT, as its documentation shows."""
    # PEFT extends the lists it is given.
    config = copy.deepcopy(config)
    name = "dtype" if Version(transformers.__version__).major >= 5 else "torch_dtype"
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, **{name: dtype})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(
            base,
            peft.LoraConfig(task_type="CAUSAL_LM", **config),
            autocast_adapter_dtype=autocast,
        )


def three_losses(model: Any) -> list[float]:
    """Train three steps with dropout on, and return the losses."""
    return losses(model, 3)


def save(model: Any, folder: Path) -> Path:
    """Save an adapter, deaf to what PEFT warns of; returns ``folder``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def same_state(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Say whether two models hold the same tensors, bit by bit, under the same names."""
    mine, its = one.state_dict(), other.state_dict()
    return list(mine) == list(its) and all(
        mine[name].dtype == its[name].dtype and torch.equal(mine[name], its[name]) for name in mine
    )
