"""What a test looks at of a loaded model, and the spec files that it loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from llmload.plugin import partitions


def example_spec(file: Path, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return a spec file as it is committed, other folders in the place of its own.

    So that a test loads the very example that users read, without its models of a hub.

    :param folders: what stands in the file -> what goes there; each must stand there.
    :raises ValueError: the file does not have one of ``folders``.
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

    spec: dict[str, Any] = put(yaml.safe_load(file.read_text()))
    if found != set(folders):
        raise ValueError(f"{file.name} has no {', '.join(sorted(set(folders) - found))}")
    return spec


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
    """Say whether two tensors have one dtype, shape and bytes, and wrap the same if they do."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if partitions.wraps(one) or partitions.wraps(other):
        pairs = zip(partitions.stored(one), partitions.stored(other), strict=False)
        return type(one) is type(other) and all(same(*pair) for pair in pairs)
    return torch.equal(*(tensor.detach().reshape(-1).view(torch.uint8) for tensor in (one, other)))
