"""Folders as the systems leave them, made from tiny models with seeded weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import systems
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import llmload
from llmload.testing import example_spec, tiny_checkpoint, tiny_model

EXAMPLES = Path(__file__).parent.parent / "examples"
OPENS_PICKLES = hasattr(torch, "accelerator")
"""torch 2.5, of the colossalai stack, opens no pickle safely."""
needs_safe_pickles = pytest.mark.skipif(
    not OPENS_PICKLES, reason="torch 2.5 opens no pickle safely"
)

IDS = torch.tensor(
    [
        [5, 6, 7, 8, 9, 10, 11, 3],
        [5, 6, 7, 8, 3, 3, 3, 3],
        [5, 6, 7, 30, 31, 3, 3, 3],
        [5, 6, 7, 8, 3, 3, 3, 3],
    ]
)
"""Two pairs, padded with 3: one that differs from the fourth token on, one that does not differ."""
MASK = (IDS != 3).long()
PAD = 3
SYSTEMS = {
    "deepspeed_chat": lambda base: systems.ChatRewardModel(base, PAD),
    "coati": systems.CoatiRewardModel,
    "trl": systems.TrlValueHead,
}
CASES = {
    ("reward_head", "deepspeed_chat"): "base",
    ("critic_head", "deepspeed_chat"): "base",
    ("reward_head", "coati"): "base",
    ("critic_head", "coati"): "base",
    ("value_head", "trl"): "causal_lm",
}
"""Section and layout of every wrapped model -> its ``auto_class``."""


def saved(
    folder: Path, layout: str, model_type: str = "llama", dtype: torch.dtype = torch.float32
) -> tuple[Path, nn.Module]:
    """Save a trained model as its system would; returns the folder and the model."""
    tiny_checkpoint(folder, model_type, pad=True, dtype=dtype)
    model = tiny_model(model_type, seed=9, dtype=dtype)
    torch.manual_seed(1)
    theirs = SYSTEMS[layout](model if layout == "trl" else systems.base_of(model)).eval()
    if layout != "trl":  # whose head stays float32
        theirs.to(dtype)
    if layout == "trl":
        tensors = {name: value.clone() for name, value in theirs.file().items()}
        if model.config.tie_word_embeddings:
            del tensors["lm_head.weight"]  # safetensors holds it once
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        write(folder, theirs.state_dict())
    return folder, theirs


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write a folder's only weights: a pickle, or what it has to be converted to on torch 2.5."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    if OPENS_PICKLES:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").unlink(missing_ok=True)
        copies = {name: value.clone() for name, value in tensors.items()}
        save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Read them back."""
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def load(folder: Path, case: tuple[str, str], **keys: Any) -> llmload.LoadResult:
    """Load a folder with the section of ``case``; keys of the section start with its name."""
    section, layout = case
    mine = {k.removeprefix("head_"): keys.pop(k) for k in list(keys) if k.startswith("head_")}
    spec = {
        "model": str(folder),
        "auto_class": CASES.get(case, "sequence_classification"),
        "allow_pickle": layout in ("deepspeed_chat", "coati"),
        section: {"layout": layout, **mine},
    }
    return llmload.load(spec | keys)


def example(name: str, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return ``examples/NAME.yaml`` as it is committed, other folders in the place of its own."""
    return example_spec(EXAMPLES / f"{name}.yaml", folders)


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the keyword of the installed transformers for a model's dtype."""
    modern = int(transformers.__version__.partition(".")[0]) >= 5
    return {"dtype" if modern else "torch_dtype": dtype}


def alike(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Hold outputs of equal weights to each other, within a few roundings of bfloat16.

    The order of sums depends on where in memory weights lie, and mapped ones lie elsewhere.
    """
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def refusal(*args: Any, error: type[Exception] = llmload.RequestError, **keys: Any) -> str:
    import pytest

    with pytest.raises(error) as caught:
        load(*args, **keys)
    return str(caught.value)
