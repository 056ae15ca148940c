"""The committed examples, and what is in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llmload.testing import example_spec

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def recipe(name: str, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return ``examples/NAME.yaml`` as it is committed, other folders in the place of its own."""
    return example_spec(EXAMPLES / f"{name}.yaml", folders)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a folder, as it is in the file."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
