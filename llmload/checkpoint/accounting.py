"""How a checkpoint's keys fit a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmload.errors import Problem

if TYPE_CHECKING:
    from torch import nn

    from llmload.checkpoint.assembled import Assembled
    from llmload.checkpoint.header import TensorInfo


_PLAIN = ("float32", "float16", "bfloat16")
"""Dtypes in which no method stores codes without further tensors beside them."""


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
    assembled: Mapping[str, Assembled]
    """Name in the model -> how its value is put together from several tensors of the file or cut
    out of one, without values: where every element lies can be computed."""
    computed: tuple[TensorInfo, ...]
    """Tensors of the file that are changed in other ways, for which they are read whole."""
    rules: tuple[Any, ...] | None
    """transformers' rules for the model, each of which says whether it matched, where they change
    no key of the checkpoint; None where they do."""

    @property
    def stored_bytes(self) -> dict[str, int]:
        """Bytes in the checkpoint of each value that is read as it is or put together, by name."""
        whole = {name: info.nbytes for name, info in self.as_stored.items()}
        return whole | {name: value.nbytes for name, value in self.assembled.items()}

    def misfits(self) -> list[Problem]:
        """Return the problem of each tensor of another shape or kind than the model takes."""
        return [
            Problem(
                where=name,
                message=f"the checkpoint has {stored}, the model takes {expected}",
                fix="Check that config.json and weights belong together.",
            )
            for name, stored, expected in self.mismatched
        ]


def as_quantised(model: nn.Module, plain: Accounting) -> Accounting:
    """Return how a quantised checkpoint fits, from how it would fit the model that it was made of.

    Each method stores codes and statistics of a module's weight under names of its own, beside the
    weight's or instead of it: such a module is left to whoever reads them. What remains is told of
    every method alike: modules without any tensor, tensors of no module, shapes of what is plain.
    """
    quantised = {name.rpartition(".")[0] for name in model.state_dict()}
    quantised = {path for path in quantised if any(_within(n, path) for n in plain.unexpected)}
    return replace(
        plain,
        missing=tuple(n for n in plain.missing if n.rpartition(".")[0] not in quantised),
        unexpected=tuple(n for n in plain.unexpected if _is_of_none(model, n)),
        mismatched=tuple(
            (name, stored, expected)
            for name, stored, expected in plain.mismatched
            if stored.startswith(_PLAIN) and name.rpartition(".")[0] not in quantised
        ),
        failed={},
    )


def _within(name: str, path: str) -> bool:
    return name.startswith(f"{path}.") if path else "." not in name


def _is_of_none(model: nn.Module, name: str) -> bool:
    """Whether a tensor's name leads to no module, or no further than a list of modules."""
    from torch import nn

    module = model
    for part in name.split(".")[:-1]:
        inner = module._modules.get(part)
        if inner is None:
            break
        module = inner
    return module is model or isinstance(module, nn.ModuleList | nn.ModuleDict)
