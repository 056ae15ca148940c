"""One load, from the agreement of the ranks to the audit. Imported lazily: it needs torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from llmload import Problem
from llmload.plugin import Rendezvous, connect, partitions, request_of
from llmload_fsdp import sharding, units
from llmload_fsdp.parts import span_of
from llmload_fsdp.placement import Sharded
from llmload_fsdp.section import ParallelSection

if TYPE_CHECKING:
    from torch import nn

    from llmload.plugin import LoadContext
    from llmload_fsdp.sizes import Sizes

_PATIENCE = 600.0
"""Seconds that ranks which still start are waited for."""


class Session(AbstractContextManager["Session"]):
    """What one load holds on to.

    :param sizes: of the mesh.
    :param ranks: all of them, which meet when this is entered.
    """

    def __init__(self, ctx: LoadContext, sizes: Sizes, ranks: Rendezvous) -> None:
        self._ctx = ctx
        self._ranks = ranks
        self._section = ctx.section(ParallelSection)
        self._sizes = sizes
        self._config = sizes.config(self._section)
        self._placement: Sharded | None = None
        self._manager: Any = None

    def __enter__(self) -> Session:
        """Gather the ranks and agree; give the streaming loader its placement."""
        deadline = self._section.deadline
        ranks = self._ranks.meet(self._ctx, lambda: _connect(deadline), deadline)
        ranks.agree(
            request_of(
                self._ctx,
                apart="parallel",
                details={"`parallel`": self._section.model_dump(mode="json")},
                digests=self._section.digests,
            )
        )
        if not self._sizes.shards_only:  # transformers spreads layers and experts while it loads
            self._ctx.load_options["distributed_config"] = self._config
        else:
            from transformers.distributed.utils import initialize_distributed_mesh

            _, self._manager = initialize_distributed_mesh(self._config)
            self._placement = Sharded(self._mesh(), ranks, offload=self._section.fsdp_cpu_offload)
            self._ctx.placement = self._placement
        return self

    def _mesh(self) -> Any:
        if self._manager is None:  # one rank
            from torch.distributed.device_mesh import init_device_mesh

            return init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
        copies = self._sizes.dp_replicate > 1
        return self._manager.get_mesh(("dp_replicate", "fsdp") if copies else "fsdp")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing is to be given back: the ranks part when the load's scope ends."""

    def distribute(self, model: nn.Module) -> nn.Module:
        """Let FSDP2 take the finished model, and mark it as transformers marks its own."""
        placement = self._placement
        if placement is None:
            self._record_others(model)
            return model
        base = sharding.base_of(model)
        made = sharding.shard(model, placement, self._ctx.handed_on["parallel"], self._config)
        _mark(base, self._config, self._manager)
        self._record(model, {"units": units.layer_numbers(made)})
        return model

    def _record_others(self, model: nn.Module) -> None:
        base: Any = sharding.base_of(model)
        plans = {"tp_plan": base._tp_plan, "ep_plan": base._ep_plan if self._sizes.ep > 1 else {}}
        self._record(model, {name: dict(plan) for name, plan in plans.items() if plan})

    def _record(self, model: nn.Module, facts: dict[str, Any]) -> None:
        mesh = {"dp_replicate": self._sizes.dp_replicate, "fsdp": self._sizes.fsdp}
        mesh |= {"tp": self._sizes.tp, "ep": self._sizes.ep}
        held = sum(
            (p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters()
        )
        found = {"rank": dist.get_rank(), "ranks": self._sizes.ranks, "mesh": mesh}
        self._ctx.record("parallel", found | {"shard_bytes": held} | facts)

    def audit(self, model: nn.Module) -> Iterator[Problem]:
        """Check that each parameter is spread, and how much of it this rank holds."""
        placement = self._placement
        if placement is None:
            return
        for name, parameter in model.named_parameters():
            shape = partitions.shape(parameter)
            wanted = span_of(shape, placement.rank, placement.ranks).length
            held = parameter.to_local().numel() if isinstance(parameter, DTensor) else None
            if held != wanted:
                said = "is not sharded" if held is None else f"has {held} elements on this rank"
                yield Problem(
                    where=name,
                    message=f"the parameter {said}, where its part of {tuple(shape)} over"
                    f" {placement.ranks} ranks is {wanted}",
                    fix="A plugin after `parallel` changed it; report this to its makers.",
                )


def _connect(deadline: float) -> None:
    connect(_start, what="the model is spread", patience=_PATIENCE, deadline=deadline)


def _start() -> None:
    from transformers.distributed.utils import _ensure_torch_distributed

    _ensure_torch_distributed()


def _mark(base: Any, config: Any, manager: Any) -> None:
    """Say what ``from_pretrained(distributed_config=...)`` says: the Trainer then leaves the model
    as it is, and ``save_pretrained`` gathers it."""
    if manager is None:
        return
    base.config.distributed_config = config
    base._mesh_manager = manager
    base._device_mesh = manager.get_mesh(("pp", "fsdp", "tp"))
    base._is_distributed_loading_by_transformers = True
    base._tp_size, base._fsdp_size = config.tp_size, config.fsdp_size
    base._is_fsdp_managed_module = True
