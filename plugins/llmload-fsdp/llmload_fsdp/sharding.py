"""The finished model handed to FSDP2: units first, without values, then each rank's rows.

``fully_shard`` is called on a model whose parameters are on the meta device, adapters, heads and
packed codes alike, so that it makes no whole copy and the dtype and ``requires_grad`` of each are
the final ones. Then each of its parameters gets the rows that were read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import PreTrainedModel
from transformers.distributed.fsdp import _get_fsdp_policy_kwargs

from llmload_fsdp import units

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from llmload_fsdp.placement import Rows, Sharded

_PARTED = ("parted", "__deepcopy__")
"""Attributes of a parameter that it has until FSDP2 takes it."""
_LAYS_OUT_ANEW = "support_avx512bf16_for_cpu"
"""By which a layer of bitsandbytes may lay out its codes anew outside of training: of a weight that
is whole for one forward it must not, or the statistics say so of the next ones too."""
_CALLED = ("generate",)
"""Methods beside ``forward`` that run the model."""


def base_of(model: nn.Module) -> PreTrainedModel:
    """Return transformers' model in what adapters and heads have been put around."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def shard(model: nn.Module, placement: Sharded, found: units.Units, config: Any) -> list[str]:
    """Let FSDP2 take the model, and return the names of its units."""
    placement.split(p for p in model.parameters() if not hasattr(p, "parted"))
    named = _named(model)
    base = base_of(model)
    prefix = next(name for name, module in model.named_modules() if module is base)
    styles = {f"{prefix}.{name}".lstrip("."): style for name, style in found.styles.items()}
    styles = units.apart(styles, [names for _, names in named.values() if len(names) > 1])
    own = dict.fromkeys(units.of_other_dtypes(model, styles), units.FREE)
    _without_values(model, named)
    _apply(model, base, own | styles, placement.mesh, _get_fsdp_policy_kwargs(config))
    _fill(model, named, placement)
    # FSDP2 looks for parameters that were replaced after a state dict was loaded: here it is empty.
    model.load_state_dict({}, strict=False)
    for method in _CALLED:
        if callable(getattr(model, method, None)):
            register_fsdp_forward_method(model, method)
    return list(own | styles)


Named = dict[int, tuple[nn.Parameter, list[str]]]
"""Identity of a parameter -> itself and all its names."""


def _named(model: nn.Module) -> Named:
    found: Named = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), (parameter, []))[1].append(name)
    return found


def _owners(model: nn.Module, names: list[str]) -> Iterator[tuple[nn.Module, str]]:
    for name in names:
        path, _, attribute = name.rpartition(".")
        yield model.get_submodule(path), attribute


def _without_values(model: nn.Module, named: Named) -> None:
    for parameter, names in named.values():
        outline = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        replaced = nn.Parameter(outline, requires_grad=parameter.requires_grad)
        for module, attribute in _owners(model, names):
            module._parameters[attribute] = replaced


def _apply(
    model: nn.Module,
    base: PreTrainedModel,
    styles: Mapping[str, str],
    mesh: Any,
    policy: Mapping[str, Any],
) -> None:
    """Make the units as transformers does, but for the root, which is the outermost module: what
    PEFT puts around a model calls its ``forward`` past the hooks."""
    kept = {}
    for name, style in sorted(styles.items(), key=lambda unit: -unit[0].count(".")):
        module = model.get_submodule(name)
        if style == units.FREE:
            fully_shard(module, mesh=mesh, reshard_after_forward=True, **policy)
        else:
            kept[name] = module
    if _alike(kept.values()) and units.tail(base, kept):
        fully_shard(list(kept.values()), mesh=mesh, reshard_after_forward=False, **policy)
    else:
        for module in kept.values():
            fully_shard(module, mesh=mesh, reshard_after_forward=False, **policy)
    fully_shard(model, mesh=mesh, **policy)


def _alike(modules: Iterable[nn.Module]) -> bool:
    """Whether what is trained of some modules has one dtype."""
    trained = (p for module in modules for p in module.parameters() if p.requires_grad)
    return len({parameter.dtype for parameter in trained}) < 2


def _fill(model: nn.Module, named: Named, placement: Sharded) -> None:
    """Put each rank's rows where FSDP2 has parameters without values."""
    placements = [Replicate()] * (placement.mesh.ndim - 1) + [Shard(0)]
    for parameter, names in named.values():
        rows: Rows = parameter.parted  # type: ignore[attr-defined]
        shape = parameter.shape
        # What a plugin has cast since is cast here: the ghost has had the new dtype.
        local = rows.part.to(parameter.dtype).view(-1, *shape[1:])
        spread = DTensor.from_local(
            local,
            placement.mesh,
            placements,
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )
        made = nn.Parameter(spread, requires_grad=parameter.requires_grad)
        noted = {key: value for key, value in vars(parameter).items() if key not in _PARTED}
        vars(made).update(noted)
        for module, attribute in _owners(model, names):
            module._parameters[attribute] = made
            if _LAYS_OUT_ANEW in vars(module):
                setattr(module, _LAYS_OUT_ANEW, False)
