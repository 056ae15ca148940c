"""Parameters that do not hold their own values: those of which a process keeps a part, and those
that wrap others.

There are three kinds of parts. A parameter of DeepSpeed ZeRO-3 is empty where its values were, and
keeps its shape and its part in attributes of its own (``ds_shape``, ``ds_tensor``). One that
carries a :class:`Parted` in its attribute ``parted`` has its shape and its dtype, and no value that
means anything; a plugin makes such parameters while it loads, and turns them into its library's own
in ``distribute``. A ``DTensor`` is what torch makes of them, in the finished model. One that wraps
other tensors, as torchao's do, has a shape and a dtype and keeps codes and scales in its place.
Whoever looks at sizes or values of a model asks here, and works for all models alike. Imports no
torch.

What a plugin needs of it in ``post_load``, partitioned or not::

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

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from llmload.errors import CheckpointError, Problem

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed import ProcessGroup


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


class Parted(Protocol):
    """What a parameter carries as ``parted`` of whose values this process holds a part.

    The parameter has the shape of the whole, and its dtype is the one that counts: a part in
    another is cast when it is used.
    """

    part: torch.Tensor
    """The elements that are held, flat."""
    start: int
    """Index of the first of them in the whole laid out flat."""
    group: ProcessGroup
    """The processes that hold the whole together."""
    device: torch.device
    """Where this process computes."""

    def gather(self) -> torch.Tensor:
        """Return the whole, in the part's dtype. All ranks come here alike."""

    def split(self, parameters: Iterable[Any]) -> None:
        """Part whole parameters as this one is, by rank 0's values. All ranks come here alike."""


def is_partitioned(tensor: Any) -> bool:
    """Whether this process holds a part of the parameter."""
    return hasattr(tensor, "ds_tensor") or hasattr(tensor, "parted") or is_spread(tensor)


def is_spread(tensor: Any) -> bool:
    """Whether it is a ``DTensor``: spread over a mesh of devices by torch."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def shape(tensor: Any) -> tuple[int, ...]:
    """Return the shape of the whole."""
    return tuple(tensor.ds_shape if hasattr(tensor, "ds_shape") else tensor.shape)


def elements(tensor: Any) -> int:
    """Return the number of elements of the whole."""
    return int(tensor.ds_numel if hasattr(tensor, "ds_numel") else tensor.numel())


def values(tensor: Any) -> int:
    """Return the number of values of the whole: 4-bit codes are two to the byte, as PEFT counts."""
    # Spread over ranks it is of another class, and keeps what bitsandbytes noted on it.
    codes = type(tensor).__name__ == "Params4bit" or is_spread(tensor)
    packed = codes and getattr(tensor, "bnb_quantized", False)
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
    if is_spread(tensor):
        return _held_of_spread(tensor)
    if hasattr(tensor, "parted"):
        return tensor.parted.part, tensor.parted.start
    if not is_partitioned(tensor):
        return tensor.detach().reshape(-1), 0
    part = tensor.ds_tensor
    if part.status.name != "AVAILABLE":
        return None
    ranks = tensor.ds_numel_aligned // part.ds_numel
    span = Span.of(tensor.ds_numel, tensor.ds_process_group.rank(), ranks)
    return part[: span.length], span.start


def _held_of_spread(tensor: Any) -> tuple[torch.Tensor, int] | None:
    """Return this rank's part of a ``DTensor`` and where it begins, if it is one piece: rows that
    one dimension of the mesh divides, as FSDP2 does, or all of it."""
    from torch.distributed.tensor import Shard

    split = [(n, p) for n, p in enumerate(tensor.placements) if not p.is_replicate()]
    local = tensor.detach().to_local().reshape(-1)
    if not split:
        return local, 0
    (number, placement), *others = split
    # Its subclasses interleave rows.
    if others or type(placement) is not Shard or placement.dim != 0:
        return None
    mesh = tensor.device_mesh
    rows = -(-tensor.shape[0] // mesh.size(number)) * mesh.get_local_rank(number)
    return local, min(rows, tensor.shape[0]) * (tensor.numel() // max(tensor.shape[0], 1))


@contextmanager
def whole(tensors: Iterable[Any]) -> Iterator[None]:
    """Make partitioned parameters ordinary ones for a block, whole on every rank.

    Afterwards they are partitioned anew, by rank 0's values: they may have another shape then. All
    ranks must come here alike. A ``DTensor`` stays what it is; its ``full_tensor()`` is the whole.
    """
    kept = (tensor for tensor in tensors if is_partitioned(tensor) and not is_spread(tensor))
    found = {id(tensor): tensor for tensor in kept}
    partition = {key: _partitioner(tensor) for key, tensor in found.items()}
    for tensor in found.values():
        _make_whole(tensor)
    yield
    # Not where an error came through: the other ranks may not come here.
    for key, tensor in found.items():
        partition[key]([tensor])


def _partitioner(tensor: Any) -> Callable[[Iterable[Any]], None]:
    """Return what partitions other parameters as this one is."""
    if hasattr(tensor, "parted"):
        split: Callable[[Iterable[Any]], None] = tensor.parted.split
        return split
    convert: Callable[[Iterable[Any]], None] = tensor.convert_to_zero_parameters
    return convert


def _make_whole(tensor: Any) -> None:
    if hasattr(tensor, "parted"):
        tensor.data = tensor.parted.gather().to(tensor.dtype)
        del tensor.parted
        return
    tensor.all_gather()
    tensor.data = tensor.data.clone()
    for name in [name for name in vars(tensor) if name.startswith("ds_")]:
        delattr(tensor, name)


def _example(model: nn.Module) -> Any:
    """Return one of the model's partitioned parameters, or None."""
    return next((p for p in model.parameters() if is_partitioned(p)), None)


def _meeting(tensor: Any) -> tuple[ProcessGroup, torch.device]:
    """Return the processes that hold a partitioned parameter together, and where this one computes.

    Of a mesh with several dimensions all processes, which hold the same model.
    """
    if hasattr(tensor, "parted"):
        return tensor.parted.group, tensor.parted.device
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_process_group, tensor.device
    import torch.distributed as dist

    mesh, world = tensor.device_mesh, dist.group.WORLD
    assert world is not None  # a mesh is made of a process group
    return mesh.get_group() if mesh.ndim == 1 else world, tensor.device


def split(new: nn.Module, *, like: nn.Module) -> None:
    """Partition the parameters of a new module as those of ``like`` are.

    Every rank gets its part of rank 0's values, so it does not matter what the others drew; buffers
    stay whole and become rank 0's. Where ``like`` is not partitioned, or is on the meta device,
    nothing happens. All ranks must come here alike.
    """
    model = _example(like)
    if model is None:
        return
    device = _meeting(model)[1]
    _partitioner(model)([p for p in new.parameters() if not is_partitioned(p)])
    for buffer in new.buffers():
        buffer.data = buffer.data.to(device)
    make_equal(new.buffers(), like=like)


def make_equal(tensors: Iterable[torch.Tensor], *, like: nn.Module) -> None:
    """Give whole tensors rank 0's values on every rank, where ``like`` is partitioned.

    All ranks must come here alike.
    """
    model = _example(like)
    if model is None:
        return
    import torch
    import torch.distributed as dist

    group, device = _meeting(model)
    with torch.no_grad():
        for tensor in tensors:
            sent = tensor.to(device).contiguous()
            dist.broadcast(sent, dist.get_global_rank(group, 0), group=group)
            _write(tensor, sent)


def with_nan(tensors: Mapping[str, torch.Tensor], *, like: nn.Module) -> dict[str, torch.Tensor]:
    """Return those of some partitioned tensors of which any rank's part holds a NaN.

    All ranks must come here alike.
    """
    if not tensors:
        return {}
    import torch
    import torch.distributed as dist

    group, device = _meeting(_example(like))
    parts = [held(tensor) for tensor in tensors.values()]
    found = [part is not None and bool(part[0].isnan().any()) for part in parts]
    flags = torch.tensor(found, dtype=torch.int32, device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
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
            message="its partition is on a disk, or split by other than rows",
            fix="Load the state dict into a model without `offload_param: {device: nvme}` and"
            " without tensor parallelism.",
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


def _write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a value into a tensor; an expanded one holds each of its values once."""
    once = tuple(slice(1) if step == 0 else slice(None) for step in tensor.stride())
    tensor[once].copy_(value[once])


def fill(tensor: Any, value: torch.Tensor) -> None:
    """Copy a value of the whole shape into a tensor, or this rank's part of it."""
    import torch

    with torch.no_grad():
        # DeepSpeed's is whole beside its part while it is gathered.
        gathered = hasattr(tensor, "ds_tensor") and tensor.numel() == elements(tensor)
        if gathered or not is_partitioned(tensor):
            _write(tensor.data, value)
        if is_partitioned(tensor):
            part = held(tensor)
            assert part is not None  # load_state_dict saw to it
            flat, start = part
            flat.copy_(value.reshape(-1)[start : start + flat.numel()])
