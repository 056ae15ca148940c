"""The committed examples, and what every test that holds one to its system looks at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import nn

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def recipe(name: str, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return ``examples/NAME.yaml`` as it is committed, other folders in the place of its own.

    :param folders: what stands in the file -> what goes there; each must stand there.
    """
    found: set[str] = set()

    def put(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: put(item) for key, item in value.items()}
        if isinstance(value, list):
            return [put(item) for item in value]
        if isinstance(value, str) and value in folders:
            found.add(value)
            return str(folders[value])
        return value

    spec = put(yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text()))
    assert found == set(folders)
    assert isinstance(spec, dict)
    return spec


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a folder, as it is in the file."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return all parameters by the names they have without an adapter, tied ones under each."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in base.named_parameters(remove_duplicate=False)
    }


def trainable(model: nn.Module) -> set[str]:
    """Return the names of the parameters that are trained, as :func:`parameters` has them."""
    return {name for name, parameter in parameters(model).items() if parameter.requires_grad}


def hold_frozen(model: nn.Module) -> None:
    """Assert that nothing of a model is trained, and that no module is in train mode."""
    assert trainable(model) == set()
    assert not any(module.training for module in model.modules())


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two tensors have one dtype, shape and bytes."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        *(tensor.detach().reshape(-1).view(torch.uint8) for tensor in (one, other))
    )
