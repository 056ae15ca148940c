"""What each rank reads and keeps of a model: one rule for the load, its plan and simulations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmload.plugin import Span, installed_transformers

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmload.plugin import Accounting, LoadContext


def own_span(module: nn.Module, attribute: str, elements: int, rank: int, ranks: int) -> Span:
    """Return a rank's part of a weight: of a parameter one of ``ranks``, of a buffer all of it."""
    if attribute in module._buffers:
        return Span.of(elements, 0, 1)
    return Span.of(elements, rank, ranks)


def dtype_of(like: torch.Tensor, model: torch.dtype) -> torch.dtype:
    """Return a partition's dtype.

    DeepSpeed gives every parameter of floating point the model's, modules that transformers would
    keep in float32 included.
    """
    return model if like.is_floating_point() else like.dtype


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank will read and keep."""

    read: int
    """Bytes of the checkpoint. Tensors that transformers computes others of are read whole by every
    rank."""
    computed: int
    """Those among them."""
    kept: int
    """Bytes of the partitions, padding included, tied ones once, and of the buffers."""


def share(ctx: LoadContext, accounting: Accounting, rank: int, ranks: int) -> Share:
    """Say beforehand what a rank will read and keep, from headers and the model without storage."""
    model = ctx.blank
    computed = sum(info.nbytes for info in accounting.computed)
    read = computed
    for name, nbytes in accounting.stored_bytes.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        elements = getattr(module, attribute).numel()
        span = own_span(module, attribute, elements, rank, ranks)
        # As many bytes as the checkpoint has for an element; what the model will have may be wider.
        read += span.length * nbytes // max(elements, 1)
    tied = installed_transformers().tied_names(model)
    dtypes = installed_transformers().final_dtypes(model, accounting, ctx.dtype)
    kept = sum(
        buffer.numel() * dtypes.get(name, buffer.dtype).itemsize
        for name, buffer in model.named_buffers()
    )
    for name, parameter in model.named_parameters():
        # A tied name is the parameter of another, and takes no memory of its own.
        if name not in tied:
            size = Span.of(parameter.numel(), rank, ranks).size
            kept += size * dtype_of(parameter, ctx.dtype).itemsize
    return Share(read, computed, kept)
