"""Each parameter with the rows of it that a rank keeps; nothing else is read.

Until the model is finished, a parameter is one element expanded to its full shape, with the rows in
its attribute ``parted``: modules can be replaced, adapters put around it and embeddings resized as
in a whole model. FSDP2 takes over in :mod:`llmload_fsdp.sharding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from llmload.plugin import WORTH_MAPPING, LoadFailedError, Part, Span
from llmload_fsdp.parts import span_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    from llmload.plugin import Ranks, Source, Target


class Rows:
    """The rows of one parameter that this rank holds: what ``parted`` is.

    :param part: flat, without padding.
    :param shape: of the whole.
    """

    def __init__(self, owner: Sharded, part: torch.Tensor, shape: torch.Size, span: Span) -> None:
        self._owner = owner
        self.part = part
        self.shape = shape
        self.start = span.start
        self.size = span.size
        self.group: ProcessGroup = owner.everybody
        self.device = owner.device

    @torch.no_grad()
    def gather(self) -> torch.Tensor:
        """Return the whole, from all ranks that share it."""
        group, ranks = self._owner.shards, self._owner.ranks
        sent = self.part.new_zeros(self.size, device=self.device)
        sent[: self.part.numel()].copy_(self.part)
        found = sent.new_empty(self.size * ranks)
        dist.all_gather_into_tensor(found, sent, group=group)
        return found[: math.prod(self.shape)].view(self.shape).clone()

    def split(self, parameters: Iterable[nn.Parameter]) -> None:
        """Part whole parameters as this one is, by rank 0's values."""
        self._owner.split(parameters)


class Sharded:
    """The streaming engine's placement under FSDP2.

    :param mesh: of one dimension, ``fsdp``, or with that of the copies before it.
    :param offload: keep the parts in host memory.
    :param agreed: all ranks, which meet before the first collective.
    """

    replaceable = True

    def __init__(self, mesh: DeviceMesh, agreed: Ranks, *, offload: bool) -> None:
        self._agreed = agreed
        self.mesh = mesh
        self.shards = mesh.get_group("fsdp")
        self.ranks = dist.get_world_size(self.shards)
        self.rank = dist.get_rank(self.shards)
        world = dist.group.WORLD
        assert world is not None
        self.everybody: ProcessGroup = world
        self.device = _device(mesh)
        self._home = torch.device("cpu") if offload else self.device

    def prepare(self, model: PreTrainedModel) -> None:
        """Leave the model as it is."""

    def extent(
        self, name: str, module: nn.Module, attribute: str, shape: Sequence[int]
    ) -> tuple[int, int]:
        """Return this rank's rows, laid out flat; of a buffer all."""
        if attribute in module._buffers:
            return 0, math.prod(shape)
        span = span_of(shape, self.rank, self.ranks)
        return span.start, span.stop

    def place(self, target: Target, source: Source) -> torch.Tensor | Part:
        """Return a parameter without storage of its own; only its rows are read.

        Buffers stay whole.
        """
        self._agreed.look()
        if target.attribute in target.module._buffers:
            value = source.whole().to(self.device, target.dtype, copy=True)
            source.release()
            return value
        span = span_of(source.shape, self.rank, self.ranks)
        part = self._mapped(source, target.dtype, span)
        if part is None:
            part = torch.empty(span.length, dtype=target.dtype, device=self._home)
            source.fill(part, span.start, span.stop)
        outline = torch.empty(source.shape, dtype=target.dtype, device="meta")
        trained = target.like.is_floating_point()
        return Part(self._held(nn.Parameter(outline, requires_grad=trained), part, span), part)

    def part(self, parameter: Any, values: Callable[[int, int], torch.Tensor]) -> Part:
        """Part a parameter of the whole shape, whose own values are not looked at."""
        span = span_of(parameter.shape, self.rank, self.ranks)
        part = values(span.start, span.stop).to(self._home, copy=True)
        return Part(self._held(parameter, part, span), part)

    def _mapped(self, source: Source, dtype: torch.dtype, span: Span) -> torch.Tensor | None:
        """Return the file's own pages, mapped for these rows alone, or None."""
        if self._home.type != "cpu" or self.device.type != "cpu" or source.dtype != dtype:
            return None
        if span.length != span.size or span.length * dtype.itemsize < WORTH_MAPPING:
            return None
        return source.mapped(span.start, span.stop)

    def _held(self, parameter: Any, part: torch.Tensor, span: Span) -> Any:
        """Give a parameter its rows; its own values are one NaN, which no one takes for a weight.

        Where it is on the meta device it becomes another object, else it stays the same one.
        """
        shape, dtype = parameter.shape, parameter.dtype
        ghost = torch.zeros(1, dtype=dtype, device=self.device)
        if dtype.is_floating_point:
            ghost.fill_(torch.nan)
        ghost = ghost.expand(shape)
        if parameter.is_meta:
            parameter = nn.Parameter(ghost, requires_grad=parameter.requires_grad)
        else:
            parameter.data = ghost
        parameter.parted = Rows(self, part, shape, span)
        # torch's own copy of a parameter leaves its attributes behind, and with them the rows.
        parameter.__deepcopy__ = lambda memo: self._copied(parameter, memo)
        return parameter

    def _copied(self, parameter: Any, memo: dict[int, Any]) -> Any:
        """Return a copy with rows of its own, such as PEFT makes of a module to save."""
        rows: Rows = parameter.parted
        span = Span(rows.start, rows.start + rows.part.numel(), rows.size)
        outline = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        like = nn.Parameter(outline, requires_grad=parameter.requires_grad)
        memo[id(parameter)] = made = self._held(like, rows.part.clone(), span)
        return made

    @torch.no_grad()
    def split(self, parameters: Iterable[nn.Parameter]) -> None:
        """Part whole parameters in place, by rank 0's values. All ranks come here alike."""
        for parameter in parameters:
            whole = parameter.data.to(self.device).contiguous()
            if whole.is_floating_point() and bool(whole.isnan().any()):
                raise LoadFailedError(
                    f"a new parameter of shape {tuple(whole.shape)} holds NaN: it was computed from"
                    " a weight of which each rank has a part",
                    fix="Let the plugin that makes it compute it under `partitions.whole`.",
                )
            dist.broadcast(whole, 0)
            span = span_of(whole.shape, self.rank, self.ranks)
            part = whole.reshape(-1)[span.start : span.stop].to(self._home, copy=True)
            parameter.data = whole
            self._held(parameter, part, span)

    def finish(self, model: PreTrainedModel) -> None:
        """Give all ranks rank 0's values of what the checkpoint lacks."""
        self._agreed.meet("placed")
        self.split(p for p in model.parameters() if not hasattr(p, "parted") and not p.is_meta)
        for buffer in model.buffers():
            if not buffer.is_meta:  # another name of one that is not: it becomes that one
                buffer.data = buffer.data.to(self.device)


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())
