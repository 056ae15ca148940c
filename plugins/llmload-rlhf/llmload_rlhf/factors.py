"""LoRA factors that old coati's files keep beside the weights, added to these when they are loaded.

Facts from ColossalAI v0.2.8 and v0.3.4 (applications/Chat/coati/models/lora.py): an adapted linear
layer saves ``weight``, ``lora_A`` (r, in) and ``lora_B`` (out, r), unless its strategy merged them,
and computes with ``weight + lora_B @ lora_A / r``, as ``lora_alpha`` is always 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llmload import Problem, RequestError
from llmload.plugin import partitions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmload import LoadContext
    from llmload.plugin import TensorInfo

_A, _B = ".lora_A", ".lora_B"
MERGED_BY = ("0.2.8", "0.3.4")
"""Versions of coati whose scaling is known: ColossalChat's is in no file."""


def factors_in(keys: Iterable[str]) -> list[str]:
    """Return the keys that name a factor."""
    return [key for key in keys if key.endswith((_A, _B))]


def hold_to_version(keys: list[str], section: str, version: str) -> None:
    """Refuse factors of a version that says nothing of their scaling."""
    if keys and version not in MERGED_BY:
        raise RequestError(
            f"the checkpoint keeps {len(keys)} LoRA factors beside its weights, as"
            f" {min(keys)!r}, and no file says how {version} scaled them",
            fix="If an old coati saved it, write `version: 0.2.8` or `version: 0.3.4`, which"
            " merge them; otherwise merge them before they are saved.",
            where=f"{section}.version",
        )


def problems(ctx: LoadContext, head: str, prefix: str) -> Iterator[Problem]:
    """Find factors that are alone, have no weight to go to, or do not fit it."""
    stems = _stems(ctx.claimed)
    if stems and ("kbit" in ctx.sections or getattr(ctx.config, "quantization_config", None)):
        yield Problem(
            where="kbit",
            message="the checkpoint keeps LoRA factors beside its weights, and they cannot be added"
            " to quantised ones",
            fix="Load it without, save it, and quantise what was saved.",
        )
    weights = {key: tuple(value.shape) for key, value in ctx.blank.state_dict().items()}
    weights |= {name: tuple(info.shape) for name, info in ctx.claimed.items()}
    for stem in stems:
        a, b = (ctx.claimed.get(stem + part) for part in (_A, _B))
        info = a or b
        assert info is not None
        name = stem if stem == head else stem.removeprefix(prefix)
        shape = weights.get(f"{name}.weight")
        if a is None or b is None:
            message = f"the checkpoint has no {stem + (_A if a is None else _B)!r} beside it"
        elif shape is None:
            message = "the model has no weight for this LoRA factor"
        elif (*b.shape[:1], *a.shape[1:]) != shape or a.shape[:1] != b.shape[1:]:
            message = (
                f"factors of shapes {tuple(b.shape)} and {tuple(a.shape)} do not fit a weight of"
                f" shape {shape}"
            )
        else:
            continue
        yield Problem(
            where=f"{info.file}: {stem + (_B if a is None else _A)}",
            message=message,
            fix="Check that the file is whole, and that config.json and weights belong together.",
        )


def said(ctx: LoadContext) -> str:
    """Return what a plan says of the factors; nothing where there are none."""
    ranks = {int(info.shape[0]) for key, info in ctx.claimed.items() if key.endswith(_A)}
    count = len(_stems(ctx.claimed))
    if not count:
        return ""
    return (
        f"LoRA factors of {count} {'layer' if count == 1 else 'layers'} are merged, scaled by 1 / r"
        f" (r: {', '.join(map(str, sorted(ranks)))})"
    )


def merge(ctx: LoadContext, base: nn.Module, head: str, prefix: str) -> None:
    """Add the factors to the transformer's weights. Of a partitioned model all ranks come here.

    The sum is taken in float32 at least and rounded once, where coati adds in the weights' dtype.
    """
    import torch

    for stem in _stems(ctx.claimed):
        if stem == head:
            continue
        parameter = base.get_parameter(f"{stem.removeprefix(prefix)}.weight")
        with partitions.whole([parameter]), torch.no_grad():
            parameter.copy_(_sum(ctx, stem, parameter.cpu()))


def of_head(ctx: LoadContext, head: str, weight: torch.Tensor) -> torch.Tensor:
    """Return the head's weight, its factors added if there are any."""
    return _sum(ctx, head, weight) if head in _stems(ctx.claimed) else weight


def _sum(ctx: LoadContext, stem: str, weight: torch.Tensor) -> torch.Tensor:
    import torch

    dtype = torch.promote_types(weight.dtype, torch.float32)
    a, b = (ctx.read(stem + part).to(dtype) for part in (_A, _B))
    return (weight.to(dtype) + (b @ a) * (1 / len(a))).to(weight.dtype)


def _stems(claimed: Mapping[str, TensorInfo | Any]) -> list[str]:
    """Return the layers that have factors."""
    return list(dict.fromkeys(key.rpartition(".")[0] for key in factors_in(claimed)))
