"""What transformers' weight conversion reads: tensors that are mapped when it asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmload.checkpoint.dtypes import torch_dtype

if TYPE_CHECKING:
    import torch

    from llmload.checkpoint.assembled import Assembled
    from llmload.checkpoint.header import TensorInfo
    from llmload.checkpoint.mapped import MappedCheckpoint

Taken = list[tuple["TensorInfo", "torch.Tensor"]]
"""Tensors of the file that were asked for since the last target was finished."""


class Outline:
    """Stands for a tensor in the rehearsal: shape and dtype, no values.

    :param taken: remembers that transformers asked for it.
    """

    def __init__(self, info: TensorInfo, taken: Taken) -> None:
        self._info = info
        self._taken = taken

    def get_shape(self) -> list[int]:
        """As a safetensors slice has it."""
        return list(self._info.shape)

    def get_dtype(self) -> str:
        """As a safetensors slice has it."""
        return self._info.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Return the tensor for transformers to convert, or to pass on as it is."""
        from llmload.checkpoint.assembled import StandIn

        tensor = self._tensor()
        # `[...]` is how transformers reads the whole of a safetensors slice.
        if index is not Ellipsis:
            tensor = tensor[index]
        return self._take(StandIn(tensor, tensor.device))

    def plain(self) -> torch.Tensor:
        """Return the tensor where transformers does not come in."""
        return self._take(self._tensor())

    def _take(self, tensor: torch.Tensor) -> torch.Tensor:
        self._taken.append((self._info, tensor))
        return tensor

    def _tensor(self) -> torch.Tensor:
        import torch

        dtype = torch_dtype(self._info.dtype)
        return torch.empty(self._info.shape, dtype=dtype, device="meta")


class View(Outline):
    """A tensor that is mapped when transformers asks for it.

    :param computed: whether transformers computes with its values, before anything is placed.
    """

    def __init__(
        self, info: TensorInfo, taken: Taken, files: MappedCheckpoint, *, computed: bool
    ) -> None:
        super().__init__(info, taken)
        self._files = files
        self._computed = computed

    def _tensor(self) -> torch.Tensor:
        take = self._files.tensor if self._computed else self._files.unread
        return take(self._info)


def as_stored(taken: Taken, values: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo] | None:
    """Return which tensor of the file each value is; None where they were made of several."""
    # By identity: what transformers had nothing to do to comes out as the object that went in.
    infos = {id(tensor): info for info, tensor in taken}
    if not infos.keys() >= {id(value) for value in values.values()}:
        return None
    return {name: infos[id(value)] for name, value in values.items()}


def assembled(taken: Taken, values: Mapping[str, torch.Tensor]) -> dict[str, Assembled] | None:
    """Return how each value is put together from tensors of the file; None if one is computed."""
    from llmload.checkpoint.assembled import Assembled

    found = {name: Assembled.of(value, taken) for name, value in values.items()}
    return None if None in found.values() else found  # type: ignore[return-value]
