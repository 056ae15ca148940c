"""Each parameter as a DeepSpeed parameter of which a rank reads its own part and nothing else.

What ``deepspeed.zero.Init`` does to a parameter once its module is built is done here when its
values are at hand. Until transformers has finished with the model, the whole parameter is one
element expanded to the full shape, on every rank; its partition is filled straight from the file.
Written against ``deepspeed/runtime/zero/partition_parameters.py`` of 0.19.8.

Imported lazily, by functions: this module needs torch and deepspeed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import Init, is_zero_param
from torch import nn

from llmload.builtin.zero3.parts import dtype_of, own_span
from llmload.plugin import WORTH_MAPPING, Part, Span

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmload.plugin import Ranks, Source, Target


class Partitioned:
    """The streaming engine's placement under ZeRO-3.

    :param config: the DeepSpeed config.
    :param ranks: all ranks, agreed on this load; they meet before the first collective.
    :param done: called with the model once every parameter is partitioned.
    """

    replaceable = True

    def __init__(
        self, config: dict[str, Any], ranks: Ranks, done: Callable[[PreTrainedModel], None]
    ) -> None:
        # It knows dtype, devices, offload and process group, and is never entered: that would
        # patch torch's factories and send every parameter whole to every rank.
        self._init = Init(config_dict_or_path=config)
        self._ranks = ranks
        self._done = done

    def prepare(self, model: PreTrainedModel) -> None:
        """Leave the model as it is."""

    def extent(
        self, name: str, module: nn.Module, attribute: str, shape: Sequence[int]
    ) -> tuple[int, int]:
        """Return this rank's part; see :meth:`llmload.plugin.Plain.extent`."""
        ranks = self._init.dp_world_size
        span = own_span(module, attribute, math.prod(shape), self._init.rank, ranks)
        return span.start, span.stop

    def place(self, target: Target, source: Source) -> torch.Tensor | Part:
        """Return a parameter without storage of its own; only its part is read.

        Buffers are not partitioned.
        """
        self._ranks.look()
        device = self._init.local_device
        if target.attribute in target.module._buffers:
            value = source.whole().to(device, target.dtype, copy=True)
            source.release()
            return value
        # transformers looks at shapes, and sets the parameter in its module; neither needs memory.
        ghost = torch.empty(1, dtype=dtype_of(target.like, self._init.dtype), device=device)
        parameter: Any = nn.Parameter(
            ghost.expand(source.shape), requires_grad=target.like.is_floating_point()
        )
        # Gives it what DeepSpeed wants of a parameter, and does not partition it.
        self._init._convert_to_deepspeed_param(parameter)
        init, elements = self._init, parameter.ds_numel
        span = own_span(target.module, target.attribute, elements, init.rank, init.dp_world_size)
        partition = self._mapped(parameter, source, span)
        if partition is None:
            partition = self._empty(parameter, span)
            source.fill(partition[: span.length], span.start, span.stop)
        return self._keep(parameter, partition, span)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device(self._init.local_device)

    def part(self, parameter: Any, values: Callable[[int, int], torch.Tensor]) -> Part:
        """Partition a parameter of the whole shape, whose own values are not looked at.

        :param values: returns the elements from an index to another of the whole laid out flat.
        """
        self._init._convert_to_deepspeed_param(parameter)
        span = Span.of(parameter.ds_numel, self._init.rank, self._init.dp_world_size)
        partition = self._empty(parameter, span)
        partition[: span.length].copy_(values(span.start, span.stop))
        return self._keep(parameter, partition, span)

    def _mapped(self, parameter: Any, source: Source, span: Span) -> torch.Tensor | None:
        """Return the file's own pages, mapped for this partition alone, or None.

        Where nothing needs to be cast, moved or padded they cost no copy, and DeepSpeed lets go of
        them one by one when ``initialize`` lays all partitions out anew.
        """
        if (
            torch.device(self._device(parameter)).type != "cpu"
            or self._pins(parameter)
            or source.dtype != parameter.dtype
            or span.length != span.size
            or span.size * parameter.element_size() < WORTH_MAPPING
        ):
            return None
        return source.mapped(span.start, span.stop)

    def _empty(self, parameter: Any, span: Span) -> torch.Tensor:
        """Return memory for a partition where DeepSpeed would have it, its padding zero."""
        device = self._device(parameter)
        partition = torch.empty(span.size, dtype=parameter.dtype, device=device)
        if self._pins(parameter):
            partition = get_accelerator().pin_memory(partition)
        partition[span.length :].zero_()
        return partition

    def _device(self, parameter: Any) -> Any:
        return self._init.local_device if parameter.ds_persist else self._init.remote_device

    def _pins(self, parameter: Any) -> bool:
        return bool(self._init.pin_memory) and self._device(parameter) == OffloadDeviceEnum.cpu

    def _keep(self, parameter: Any, partition: Any, span: Span) -> Part:
        """Give the parameter its partition."""
        partition.ds_numel = span.size
        partition.status = PartitionedParamStatus.AVAILABLE
        partition.final_location = None  # a disk is DeepSpeed's own affair
        parameter.ds_tensor = partition
        parameter.ds_numel_aligned = span.size * self._init.dp_world_size
        return Part(parameter, partition[: span.length])

    def finish(self, model: PreTrainedModel) -> None:
        """Drop what stood for whole parameters, and give all ranks rank 0's missing weights."""
        self._ranks.meet("placed")
        init = self._init
        from_file = [p for p in model.parameters() if is_zero_param(p)]
        for parameter in from_file:
            # It has a partition, so DeepSpeed lets go of the whole, the ghost, and copies nothing.
            parameter.partition()
        # The others are whole, newly initialised: here each is sent from rank 0 and partitioned.
        # All ranks have the same ones, in the same order.
        init._convert_to_zero_parameters(model.parameters())
        for buffer in model.buffers():
            if not buffer.is_meta:  # another name of one that is not: it becomes that one
                buffer.data = buffer.data.to(init.local_device)
        if hasattr(init, "_keep_in_fp32"):  # since 0.19.8
            init._keep_in_fp32(model)
        if init.mem_efficient_linear:
            init._enable_mem_efficient_linear()
        self._done(model)
