"""Which modules FSDP2 gathers one after the other: transformers' plan, or blocks that are found."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmload import RequestError
from llmload.plugin import in_one_line

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

FREE = "free_full_weight"
"""transformers' word for a unit whose weights are let go after its forward."""


@dataclass(frozen=True)
class Units:
    """The units of a model, inner ones first; what is in none belongs to the root."""

    styles: Mapping[str, str]
    """Name of a module of the base model -> style."""
    blocks: int
    """How many of them are blocks: one of several alike."""
    found: bool
    """Whether the blocks are not in transformers' plan and were found in the model."""

    @property
    def freed(self) -> list[str]:
        """Those whose weights are let go after their forward."""
        return [name for name, style in self.styles.items() if style == FREE]

    def said(self) -> str:
        """Return a sentence for people."""
        if not self.blocks:
            return "no blocks were found: the whole model is gathered at once in each forward"
        how = ", which transformers' plan lacks" if self.found else ""
        return f"{len(self.styles) + 1} units, {self.blocks} of them blocks{how}"


def plan(model: PreTrainedModel, config: Any) -> Units:
    """Return the units of a base model.

    :param model: on the meta device or loaded.
    :param config: transformers' ``DistributedConfig``.
    :raises RequestError: the ``fsdp_plan`` does not fit the model.
    """
    try:
        _, _, styles = model._resolve_parallel_plans(config)
    except ValueError as error:
        if config.fsdp_plan or "has no `fsdp_plan`" not in str(error):
            raise RequestError(
                f"transformers refuses the plan: {in_one_line(error).rstrip('.')}",
                fix="Name modules as `named_modules()` does, with `*` for numbers.",
                where="parallel.fsdp_plan",
            ) from error
        styles = {}
    blocks = [name for name in styles if _is_numbered(name)]
    found = [] if blocks else find_blocks(model)
    styles = {**dict.fromkeys(found, FREE), **styles}
    ordered = dict(sorted(styles.items(), key=lambda unit: unit[0].count("."), reverse=True))
    return Units(ordered, len(blocks or found), bool(found))


def _is_numbered(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()


def find_blocks(model: nn.Module) -> list[str]:
    """Return the names of the blocks: members of lists that transformers would not split, or else
    of the list with most parameters whose members are of one class."""
    whole = set(getattr(model, "_no_split_modules", None) or ())
    named = [
        name
        for name, module in model.named_modules()
        if _is_numbered(name) and type(module).__name__ in whole
    ]
    return _outermost(named) or _largest_list(model)


def _outermost(names: Iterable[str]) -> list[str]:
    kept: list[str] = []
    for name in names:
        if not any(name.startswith(f"{other}.") for other in kept):
            kept.append(name)
    return kept


def _largest_list(model: nn.Module) -> list[str]:
    from torch import nn

    best: tuple[int, list[str]] = (0, [])
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        kinds = Counter(type(member).__name__ for member in module)
        size = sum(parameter.numel() for parameter in module.parameters())
        if len(kinds) == 1 and size > best[0]:
            best = size, [f"{name}.{number}" for number in range(len(module))]
    return best[1]


def apart(units: Mapping[str, str], shared: Iterable[Iterable[str]]) -> dict[str, str]:
    """Return the units without those that hold a part of the names of a shared parameter.

    FSDP2 knows a parameter under several names where one unit holds them all: the root does.
    """
    groups = [tuple(names) for names in shared]
    return {
        unit: style
        for unit, style in units.items()
        if not any(0 < sum(n.startswith(f"{unit}.") for n in g) < len(g) for g in groups)
    }


def of_other_dtypes(model: nn.Module, units: Iterable[str]) -> Iterator[str]:
    """Yield modules for units of their own: FSDP2 has one dtype for what a unit trains.

    Those are the owners of parameters whose dtype is not the one that most of their unit have.
    """
    unit_of = sorted(units, key=len, reverse=True)
    found: dict[str, list[tuple[str, torch.dtype, int]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            unit = next((u for u in unit_of if name.startswith(f"{u}.")), "")
            owner = name.rpartition(".")[0]
            found.setdefault(unit, []).append((owner, parameter.dtype, parameter.numel()))
    for members in found.values():
        sizes: Counter[torch.dtype] = Counter()
        for _, dtype, size in members:
            sizes[dtype] += size
        most = sizes.most_common(1)[0][0]
        yield from dict.fromkeys(owner for owner, dtype, _ in members if dtype != most)


def tail(model: Any, kept: Mapping[str, Any]) -> bool:
    """Whether the units that stay gathered are a final norm and a head, which go together."""
    from transformers.distributed.fsdp import is_norm_and_head_pair

    return bool(is_norm_and_head_pair(list(kept.items()), model))


def layer_numbers(names: Iterable[str]) -> list[str]:
    """Return names with ``*`` for numbers, each once."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))
