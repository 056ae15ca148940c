"""Each parameter as a DeepSpeed parameter of which a rank reads its own part and nothing else.

What ``deepspeed.zero.Init`` does to a parameter once its module is built is done here when its
values are at hand. Until transformers has finished with the model, the whole parameter is one
element expanded to the full shape, on every rank; its partition is filled straight from the file.
Written against ``deepspeed/runtime/zero/partition_parameters.py`` of 0.19.8.

Imported lazily, by functions: this module needs torch and deepspeed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import Init, is_zero_param
from torch import nn

from llmload.checkpoint.placement import Part
from llmload.partitions import Span

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmload.builtin.zero3._ranks import Ranks
    from llmload.checkpoint.placement import Source, Target


class Partitioned:
    """The streaming engine's placement under ZeRO-3.

    :param config: the DeepSpeed config.
    :param ranks: all ranks, agreed on this load; they meet before the first collective.
    :param done: called with the model once every parameter is partitioned.
    """

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

    def place(self, target: Target, source: Source) -> torch.Tensor | Part:
        """Return a parameter without storage of its own; only its part is read.

        Buffers are not partitioned. DeepSpeed gives every parameter of floating point its own one
        dtype, modules that transformers would keep in float32 included.
        """
        self._ranks.look()
        device = self._init.local_device
        if target.attribute in target.module._buffers:
            value = source.whole().to(device, target.dtype, copy=True)
            source.release()
            return value
        floating = target.like.is_floating_point()
        dtype = self._init.dtype if floating else target.dtype
        parameter = nn.Parameter(
            torch.empty(1, dtype=dtype, device=device).expand(source.shape), requires_grad=floating
        )
        part = self.part(parameter, source.flat)
        source.release()
        return part

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
        partition = self._partition(parameter, span)
        with torch.no_grad():
            partition[: span.length].copy_(values(span.start, span.stop))
            partition[span.length :].zero_()
        return Part(parameter, partition[: span.length])

    def _partition(self, parameter: Any, span: Span) -> Any:
        """Give the parameter the storage of its partition, where DeepSpeed would have it."""
        init = self._init
        device = init.local_device if parameter.ds_persist else init.remote_device
        partition: Any = torch.empty(span.size, dtype=parameter.dtype, device=device)
        if init.pin_memory and device == OffloadDeviceEnum.cpu:
            partition = get_accelerator().pin_memory(partition)
        partition.ds_numel = span.size
        partition.status = PartitionedParamStatus.AVAILABLE
        partition.final_location = None  # a disk is DeepSpeed's own affair
        parameter.ds_tensor = partition
        parameter.ds_numel_aligned = span.size * init.dp_world_size
        return partition

    def finish(self, model: PreTrainedModel) -> None:
        """Drop what stood for whole parameters, and give all ranks rank 0's missing weights."""
        self._ranks.meet("placed")
        init = self._init
        from_file = [p for p in model.parameters() if is_zero_param(p)]
        for parameter in from_file:
            parameter.partition()
        init._convert_to_zero_parameters(model.parameters())
        for buffer in model.buffers():
            buffer.data = buffer.data.to(init.local_device)
        init._keep_in_fp32(model)
        if init.mem_efficient_linear:
            init._enable_mem_efficient_linear()
        self._done(model)
