"""Holds a model against the one ``from_pretrained`` makes, bit by bit."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from llmload.hf import installed_transformers


def from_pretrained(model_class: Any, folder: Path, dtype: str = "auto", **options: Any) -> Any:
    """Call ``model_class.from_pretrained`` by the keywords of the installed transformers.

    What the model's class freezes (fixed positions, biases of a router) is frozen again, which
    transformers 5 forgets for every parameter that it loads.
    """
    name = next(iter(installed_transformers().dtype_option(torch.float32)))
    model = model_class.from_pretrained(folder, **{name: dtype}, **options)
    with torch.random.fork_rng(devices=[]):  # a few classes draw when they are built
        blank = installed_transformers().blank(type(model), model.config, torch.float32)
    frozen = {name for name, p in blank.named_parameters() if not p.requires_grad}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in frozen:
            parameter.requires_grad_(False)
    return model


def differences(ours: torch.nn.Module, theirs: torch.nn.Module) -> list[str]:
    """List every way in which two models differ: values, dtypes, ties, flags, configs."""
    found = []
    if type(ours) is not type(theirs):
        found.append(f"class {type(ours).__name__} for {type(theirs).__name__}")
    for kind in ("named_parameters", "named_buffers"):
        mine = dict(getattr(ours, kind)(remove_duplicate=False))
        other = dict(getattr(theirs, kind)(remove_duplicate=False))
        if list(mine) != list(other):
            found.append(f"{kind}: {mine.keys() ^ other.keys()}")
        for name in mine.keys() & other.keys():
            found += [f"{name}: {fault}" for fault in _tensor(mine[name], other[name])]
        if _ties(mine) != _ties(other):
            found.append(f"ties of {kind}: {_ties(mine)} for {_ties(other)}")
    if list(ours.state_dict()) != list(theirs.state_dict()):
        found.append("state_dict has other keys or another order")
    modes = [
        name
        for (name, mine), (_, other) in zip(
            ours.named_modules(), theirs.named_modules(), strict=True
        )
        if mine.training != other.training or type(mine) is not type(other)
    ]
    if modes:
        found.append(f"train mode or class of {modes[:3]}")
    return found + _configs(ours, theirs)


def _tensor(mine: torch.Tensor, other: torch.Tensor) -> list[str]:
    facts = ("dtype", "shape", "device", "requires_grad", "is_contiguous")
    found = []
    for fact in facts:
        a, b = getattr(mine, fact), getattr(other, fact)
        a, b = (a(), b()) if callable(a) else (a, b)
        if a != b:
            found.append(f"{fact} {a} for {b}")
    if not found and not torch.equal(_bytes(mine), _bytes(other)):
        found.append("other values")
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _ties(tensors: dict[str, torch.Tensor]) -> set[tuple[str, ...]]:
    groups = defaultdict(list)
    for name, tensor in tensors.items():
        groups[id(tensor)].append(name)
    return {tuple(sorted(names)) for names in groups.values() if len(names) > 1}


def _configs(ours: Any, theirs: Any) -> list[str]:
    found = []
    for name in ("config", "generation_config"):
        mine, other = getattr(ours, name, None), getattr(theirs, name, None)
        if (mine is None) != (other is None) or (mine and mine.to_dict() != other.to_dict()):
            found.append(name)
    for name in ("name_or_path", "_keep_in_fp32_modules", "all_tied_weights_keys", "hf_device_map"):
        if getattr(ours, name, None) != getattr(theirs, name, None):
            found.append(f"{name}: {getattr(ours, name, None)} for {getattr(theirs, name, None)}")
    if [str(c) for c in getattr(ours, "_weight_conversions", None) or ()] != [
        str(c) for c in getattr(theirs, "_weight_conversions", None) or ()
    ]:
        found.append("_weight_conversions")
    return found
