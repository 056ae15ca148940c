"""How a checkpoint's keys fit a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from llmload.checkpoint.header import TensorInfo


def is_parameter(model: nn.Module, name: str) -> bool:
    """Whether a name in the state dict is a parameter's, not a buffer's."""
    path, _, attribute = name.rpartition(".")
    return attribute in model.get_submodule(path)._parameters


@dataclass(frozen=True, slots=True)
class Accounting:
    """How a checkpoint's keys fit a model, found out without reading a weight."""

    missing: tuple[str, ...]
    """Names in the model that get no value from the checkpoint and must be initialised."""
    excused: tuple[str, ...]
    """The same, but the model's class declares that they may be missing."""
    unexpected: tuple[str, ...]
    """Keys that the model has no place for and its class does not ignore."""
    mismatched: tuple[tuple[str, str, str], ...]
    """Name, dtype and shape in the checkpoint, dtype and shape in the model. Dtypes disagree only
    where a parameter of floating point would be filled with integers."""
    failed: Mapping[str, str]
    """Name -> why transformers could not convert its tensors."""
    as_stored: Mapping[str, TensorInfo]
    """Name in the model -> the tensor of the file that it is, whole and unchanged."""
    assembled: Mapping[str, int]
    """Name in the model -> bytes of the value, as stored: put together from several tensors of the
    file or cut out of one, every element just where it can be computed."""
    computed: tuple[TensorInfo, ...]
    """Tensors of the file that are changed in other ways, for which they are read whole."""
    rules: tuple[Any, ...] | None
    """transformers' rules for the model, each of which says whether it matched, where they change
    no key of the checkpoint; None where they do."""
