"""Parameters that do not hold their own values: of DeepSpeed ZeRO-3, and those that wrap others.

A partitioned parameter is empty where its values were, and keeps its shape and its part in
attributes of its own (``ds_shape``, ``ds_tensor``). One that wraps other tensors, as torchao's do,
has a shape and a dtype and keeps codes and scales in its place. Whoever looks at sizes or values of
a model asks here, and works for all models alike. Imports no torch.

What a plugin needs of it in ``post_load``, under ZeRO-3 or not::

    @llmload.hookimpl
    def post_load(self, ctx, model):
        hidden = partitions.shape(model.get_input_embeddings().weight)[1]   # not weight.shape
        head = nn.Linear(hidden, 1, bias=False, dtype=ctx.dtype)
        partitions.split(head, like=model)                # its parameters, as those of the model
        model.v_head = head
        partitions.load_state_dict(head, state)           # each rank takes its own part
        with partitions.whole(head.parameters()):         # or read and write all of it
            ...
        return model
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmload.errors import CheckpointError, Problem

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class Span:
    """The elements of one parameter, laid out flat, that one rank holds.

    The parameter is cut into as many parts of one size as there are ranks. What the last parts lack
    is filled up with zeros.
    """

    start: int
    """First element."""
    stop: int
    """One past the last; the same as ``start`` where a rank holds padding alone."""
    size: int
    """Elements of the part with its padding, the same on all ranks."""

    @property
    def length(self) -> int:
        """Elements without padding."""
        return self.stop - self.start

    @classmethod
    def of(cls, elements: int, rank: int, ranks: int) -> Span:
        """Return the part of ``rank`` (from 0) in a parameter of so many elements."""
        size = -(-elements // ranks)
        return cls(min(rank * size, elements), min((rank + 1) * size, elements), size)


def is_partitioned(tensor: Any) -> bool:
    """Whether this process holds a part of the parameter."""
    return hasattr(tensor, "ds_tensor")


def shape(tensor: Any) -> tuple[int, ...]:
    """Return the shape of the whole."""
    return tuple(tensor.ds_shape if is_partitioned(tensor) else tensor.shape)


def elements(tensor: Any) -> int:
    """Return the number of elements of the whole."""
    return int(tensor.ds_numel if is_partitioned(tensor) else tensor.numel())


def values(tensor: Any) -> int:
    """Return the number of values of the whole: 4-bit codes are two to the byte, as PEFT counts."""
    packed = type(tensor).__name__ == "Params4bit" and tensor.bnb_quantized
    return elements(tensor) * (2 * tensor.element_size() if packed else 1)


def wraps(tensor: Any) -> bool:
    """Whether the tensor's class keeps its values in others, by the protocol of
    ``__tensor_flatten__``. What is spread over a mesh of devices is not meant."""
    return hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "device_mesh")


def stored(tensor: Any) -> list[torch.Tensor]:
    """Return the plain tensors in which the values are: itself, or those that it wraps."""
    if not wraps(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in stored(getattr(tensor, name))]


def nbytes(tensor: Any) -> int:
    """Return the bytes of the whole: of what it wraps, where it does."""
    if wraps(tensor):
        return sum(part.nbytes for part in stored(tensor))
    return elements(tensor) * int(tensor.element_size())


def held(tensor: Any) -> tuple[torch.Tensor, int] | None:
    """Return the elements that this process has in memory, flat, and the first one's index.

    None where they are on a disk, or nowhere as such because the tensor wraps others.
    """
    if wraps(tensor):
        return None
    if not is_partitioned(tensor):
        return tensor.detach().reshape(-1), 0
    part = tensor.ds_tensor
    if part.status.name != "AVAILABLE":
        return None
    ranks = tensor.ds_numel_aligned // part.ds_numel
    span = Span.of(tensor.ds_numel, tensor.ds_process_group.rank(), ranks)
    return part[: span.length], span.start


@contextmanager
def whole(tensors: Iterable[Any]) -> Iterator[None]:
    """Make partitioned parameters ordinary ones for a block, whole on every rank.

    Afterwards they are partitioned anew, by rank 0's values: they may have another shape then. All
    ranks must come here alike.
    """
    found = {id(tensor): tensor for tensor in tensors if is_partitioned(tensor)}
    converts = {id(tensor): tensor.convert_to_zero_parameters for tensor in found.values()}
    for tensor in found.values():
        tensor.all_gather()
        tensor.data = tensor.data.clone()
        for name in [name for name in vars(tensor) if name.startswith("ds_")]:
            delattr(tensor, name)
    yield
    # Not where an error came through: the other ranks may not come here.
    for key, tensor in found.items():
        converts[key]([tensor])


def split(new: nn.Module, *, like: nn.Module) -> None:
    """Partition the parameters of a new module as those of ``like`` are.

    Every rank gets its part of rank 0's values, so it does not matter what the others drew; buffers
    stay whole and become rank 0's. Where ``like`` is not partitioned, or is on the meta device,
    nothing happens. All ranks must come here alike.
    """
    model: Any = next((p for p in like.parameters() if is_partitioned(p)), None)
    if model is None:
        return
    model.convert_to_zero_parameters([p for p in new.parameters() if not is_partitioned(p)])
    for buffer in new.buffers():
        buffer.data = buffer.data.to(model.device)
    make_equal(new.buffers(), like=like)


def make_equal(tensors: Iterable[torch.Tensor], *, like: nn.Module) -> None:
    """Give whole tensors rank 0's values on every rank, where ``like`` is partitioned.

    All ranks must come here alike.
    """
    model: Any = next((p for p in like.parameters() if is_partitioned(p)), None)
    if model is None:
        return
    import torch
    import torch.distributed as dist

    group = model.ds_process_group
    with torch.no_grad():
        for tensor in tensors:
            sent = tensor.to(model.device).contiguous()
            dist.broadcast(sent, dist.get_global_rank(group, 0), group=group)
            tensor.copy_(sent)


def with_nan(tensors: Mapping[str, torch.Tensor], *, like: nn.Module) -> dict[str, torch.Tensor]:
    """Return those of some partitioned tensors of which any rank's part holds a NaN.

    All ranks must come here alike.
    """
    if not tensors:
        return {}
    import torch
    import torch.distributed as dist

    model: Any = next(p for p in like.parameters() if is_partitioned(p))
    parts = [held(tensor) for tensor in tensors.values()]
    found = [part is not None and bool(part[0].isnan().any()) for part in parts]
    flags = torch.tensor(found, dtype=torch.int32, device=model.device)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=model.ds_process_group)
    return {
        name: t for (name, t), flag in zip(tensors.items(), flags.tolist(), strict=True) if flag
    }


def load_state_dict(
    module: nn.Module, state: Mapping[str, torch.Tensor], *, strict: bool = True
) -> tuple[list[str], list[str]]:
    """Copy values into a module whose parameters may be partitioned.

    As ``module.load_state_dict``, which finds partitioned parameters empty. Nothing is sent and
    nothing is gathered: every rank is given the whole mapping (views of a mapped file are enough)
    and copies its own part, cast to the dtype there; buffers are copied on every rank. On the meta
    device names and shapes are checked and nothing is copied.

    :param state: name -> tensor of the whole shape. Of tied parameters one name is enough.
    :param strict: raise for names that only one side has.
    :returns: names that ``state`` lacks, and names that ``module`` lacks.
    :raises CheckpointError: with everything that does not fit; nothing was copied then.
    """
    persistent = module.state_dict(keep_vars=True).keys()
    named = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    found = {name: tensor for name, tensor in named if name in persistent}
    given = {id(tensor) for name, tensor in found.items() if name in state}
    missing = [name for name, tensor in found.items() if id(tensor) not in given]
    unexpected = [name for name in state if name not in found]
    problems = [
        Problem(
            where=name,
            message=f"the state dict has {tuple(state[name].shape)}, the model takes"
            f" {shape(tensor)}",
            fix="Resize the embeddings first, or check that weights and model belong together.",
        )
        for name, tensor in found.items()
        if name in state and tuple(state[name].shape) != shape(tensor)
    ]
    if strict:
        for names, message in (
            (missing, "the state dict has no values for it"),
            (unexpected, "the model has no place for it"),
        ):
            problems += [
                Problem(where=name, message=message, fix="Rename keys, or pass `strict=False`.")
                for name in names
            ]
    problems += [
        Problem(
            where=name,
            message="its partition is on a disk",
            fix="Load the state dict into a model without `offload_param: {device: nvme}`.",
        )
        for name, tensor in found.items()
        if name in state and held(tensor) is None
    ]
    if problems:
        raise CheckpointError(problems)
    for name, tensor in found.items():
        if name in state and not tensor.is_meta:
            fill(tensor, state[name])
    return missing, unexpected


def fill(tensor: Any, value: torch.Tensor) -> None:
    """Copy a value of the whole shape into a tensor, or this rank's part of it."""
    import torch

    with torch.no_grad():
        if tensor.numel() == elements(tensor):  # whole, or gathered at the moment
            tensor.data.copy_(value)
        if is_partitioned(tensor):
            part = held(tensor)
            assert part is not None  # load_state_dict saw to it
            flat, start = part
            flat.copy_(value.reshape(-1)[start : start + flat.numel()])
