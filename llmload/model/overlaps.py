"""Parameters and buffers that lie over each other's memory: an update of one would change another.

Files of ``torch.save`` can hold two names over one storage, such as those of a head and an
embedding that were tied when it was written. Loaded into a model that does not tie them, both are
views of the same memory.

Imported lazily, by functions: this module needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from llmload.model.reachable import registered


def part(model: nn.Module) -> list[str]:
    """Give each parameter and buffer memory of its own; returns the names of those that had none.

    Of those that overlap the one that begins first keeps its memory. One object under several
    names is one.
    """
    found = []
    for name, tensor in _overlapping(registered(model)):
        tensor.data = tensor.data.clone()
        found.append(name)
    return found


def _overlapping(
    named: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    spans: dict[torch.device, list[tuple[int, int, str, torch.Tensor]]] = {}
    for name, tensor in named:
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_meta:
            continue
        if tensor.numel() and tensor.is_contiguous():
            span = (tensor.data_ptr(), -tensor.nbytes, name, tensor)
            spans.setdefault(tensor.device, []).append(span)
    for of_device in spans.values():
        end = 0
        for start, minus_bytes, name, tensor in sorted(of_device):
            if start < end:
                yield name, tensor
            else:
                end = start - minus_bytes
