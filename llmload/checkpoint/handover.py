"""Both ends at which transformers' weight conversion meets us: what it reads, what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from llmload.checkpoint.dtypes import torch_dtype
from llmload.checkpoint.placement import Part, Source, Target

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmload.checkpoint.header import TensorInfo
    from llmload.checkpoint.mapped import MappedCheckpoint
    from llmload.checkpoint.placement import Placement
    from llmload.checkpoint.proof import Proof, Reading

Receive = Callable[[str, "dict[str, torch.Tensor]"], "dict[str, torch.Tensor]"]
"""Takes the first target's name and the finished tensors by name; returns what to set there."""


class Outline:
    """Stands for a tensor in the rehearsal: shape and dtype, no values."""

    def __init__(self, info: TensorInfo) -> None:
        self._info = info

    def get_shape(self) -> list[int]:
        """As a safetensors slice has it."""
        return list(self._info.shape)

    def get_dtype(self) -> str:
        """As a safetensors slice has it."""
        return self._info.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        import torch

        dtype = torch_dtype(self._info.dtype)
        return torch.empty(self._info.shape, dtype=dtype, device="meta")[index]


class View(Outline):
    """A tensor that is mapped when transformers asks for it; ``taken`` remembers that it did."""

    def __init__(
        self,
        info: TensorInfo,
        files: MappedCheckpoint,
        taken: list[tuple[TensorInfo, torch.Tensor]],
    ) -> None:
        super().__init__(info)
        self._files = files
        self._taken = taken

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._files.tensor(self._info)
        if index is not Ellipsis:
            tensor = tensor[index]
        self._taken.append((self._info, tensor))
        return tensor


class Handover:
    """What transformers takes for a quantiser and its operation."""

    pre_quantized = False

    def __init__(self, receive: Receive) -> None:
        self._receive = receive

    def param_needs_quantization(self, model: PreTrainedModel, name: str) -> bool:
        """Every parameter and buffer is ours to place."""
        return True

    def get_quantize_ops(self) -> Handover:
        """The operation that runs after all others."""
        return self

    def convert(
        self, collected: dict[str, Any], *, full_layer_name: str, **others: Any
    ) -> dict[str, torch.Tensor]:
        """Give on the finished tensors, which come alone or in a list of one."""
        values = {
            name: value[0] if isinstance(value, list) else value
            for name, value in collected.items()
        }
        return self._receive(full_layer_name, values)


class AbortError(BaseException):
    """Carries an error past transformers, which would note any ``Exception`` and go on."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class Receiver:
    """Hands each finished tensor to the placement, with its final dtype and device."""

    def __init__(
        self,
        model: PreTrainedModel,
        files: MappedCheckpoint,
        placement: Placement,
        proof: Proof,
        taken: list[tuple[TensorInfo, torch.Tensor]],
        dtype: torch.dtype,
        device_map: dict[str, Any] | None,
    ) -> None:
        from transformers.core_model_loading import build_glob_alternation

        self._model = model
        self._state: dict[str, torch.Tensor] = model.state_dict()
        self._files = files
        self._placement = placement
        self._proof = proof
        self._taken = taken
        self._device_map = device_map
        self._plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
        self._pattern, self._pattern_of_group, _ = build_glob_alternation(list(self._plan))

    def __call__(self, first: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Place ``values``; raises ``AbortError`` around whatever goes wrong."""
        try:
            return self._receive(first, values)
        except Exception as error:
            raise AbortError(error) from error

    def _receive(self, first: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        consumed = self._taken.copy()
        self._taken.clear()
        infos = {id(tensor): info for info, tensor in consumed}
        dtype = self._dtype(first)
        if infos.keys() >= {id(value) for value in values.values()}:
            return {
                name: self._place(name, dtype, value, [infos[id(value)]], direct=True)
                for name, value in values.items()
            }
        behind = list(infos.values())
        for info in behind:
            self._files.count(info, info.nbytes)
        if not _share_storage(values.values(), (tensor for _, tensor in consumed)):
            self._drop(behind)
            behind = []
        return {
            name: self._place(name, dtype, value, behind, direct=False)
            for name, value in values.items()
        }

    def _place(
        self,
        name: str,
        dtype: torch.dtype,
        value: torch.Tensor,
        behind: list[TensorInfo],
        *,
        direct: bool,
    ) -> torch.Tensor:
        import torch
        from transformers.integrations.accelerate import get_device

        path, _, attribute = name.rpartition(".")
        target = Target(
            name=name,
            module=self._model.get_submodule(path),
            attribute=attribute,
            like=self._state[name],
            dtype=dtype,
            device=torch.device(get_device(self._device_map, name, valid_torch_device=True)),
        )
        reading = self._proof.reading()

        def asked(part: torch.Tensor) -> None:
            if direct:  # a converted value was counted when its tensors were read
                self._files.count(behind[0], part.nbytes)
            reading.add(part)

        source = Source(value, asked, partial(self._release, reading, behind))
        placed = self._placement.place(target, source)
        parameter, stored = (
            (placed.parameter, placed.stored) if isinstance(placed, Part) else (placed, placed)
        )
        address = self._files.address(behind[0]) if direct else None
        self._proof.end(name, stored, address, reading)
        return parameter

    def _dtype(self, first: str) -> torch.dtype:
        """As transformers decides it: by the plan's pattern, else by what the model declares."""
        match = self._pattern.search(first) if self._plan else None
        if match is None:
            return self._state[first].dtype
        return self._plan[self._pattern_of_group[match.lastgroup]]

    def _release(self, reading: Reading, infos: list[TensorInfo]) -> None:
        reading.wait()
        self._drop(infos)

    def _drop(self, infos: list[TensorInfo]) -> None:
        for info in infos:
            self._files.drop(info)


def _share_storage(values: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> bool:
    of_values, of_others = (
        {tensor.untyped_storage().data_ptr() for tensor in tensors} for tensors in (values, others)
    )
    return not of_values.isdisjoint(of_others)
