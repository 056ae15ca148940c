"""One load under ZeRO-3, from the agreement of the ranks to the audit.

Imported lazily, by functions: this module needs torch, transformers and deepspeed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations import deepspeed as integration

from llmload.builtin.zero3.leaves import mark_leaf_modules
from llmload.builtin.zero3.placement import Partitioned
from llmload.builtin.zero3.process_group import connect
from llmload.builtin.zero3.section import Zero3Section
from llmload.plugin import LoadFailedError, Problem, Rendezvous, Span, partitions, request_of

if TYPE_CHECKING:
    from torch import nn

    from llmload.builtin.zero3.config import DeepSpeedConfig
    from llmload.plugin import LoadContext


class Session(AbstractContextManager["Session"]):
    """What one load holds on to, and gives back when its contexts are left."""

    def __init__(self, ctx: LoadContext, config: DeepSpeedConfig, ranks: Rendezvous) -> None:
        self._ctx = ctx
        self._ranks = ranks
        self._config = config
        self._section = ctx.section(Zero3Section)
        self._global = GlobalConfig()
        self._stack = ExitStack()

    def __enter__(self) -> Session:
        """Gather the ranks and agree; give the streaming loader a placement if we can partition."""
        with ExitStack() as stack:
            stack.enter_context(self._global)
            if self._config.stage == 3:
                deadline = self._section.deadline
                ranks = self._ranks.meet(self._ctx, lambda: connect(deadline), deadline)
                ranks.agree(
                    request_of(
                        self._ctx,
                        apart="zero3",
                        details={"the DeepSpeed config": dict(self._config.content)},
                        digests=self._section.digests,
                    )
                )
                # Else transformers' own way: with the config in sight, from_pretrained partitions
                # while it builds.
                if self._config.beyond_us() is None:
                    self._ctx.placement = Partitioned(
                        self._config.for_loading(), ranks, self.loaded
                    )
                else:
                    self.activate()
            self._stack = stack.pop_all()
        return self

    def activate(self) -> None:
        """Let transformers see the DeepSpeed config from here on."""
        self._global.activate(self._config.for_loading())

    def loaded(self, model: nn.Module) -> None:
        """Take a model whose parameters are partitioned; what follows sees the DeepSpeed config."""
        self.activate()
        partitioned: list[Any] = [p for p in model.parameters() if partitions.is_partitioned(p)]
        sizes = [p.ds_tensor.ds_numel * p.element_size() for p in partitioned]
        facts = {
            "stage": 3,
            "rank": torch.distributed.get_rank(),
            "ranks": torch.distributed.get_world_size(),
            "partition_bytes": sum(sizes),
            "leaf_modules": mark_leaf_modules(model, self._section.leaf_modules),
            "config": self._config.content,
        }
        self._ctx.record("zero3", facts)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def audit(self, model: nn.Module, *, foretold: bool) -> Iterator[Problem]:
        """Check the size of every partition.

        :param foretold: whether the plan says that there will be none.
        """
        if self._config.stage < 3:
            return
        parameters = list(model.parameters())
        if parameters and not foretold and not any(map(partitions.is_partitioned, parameters)):
            nbytes = sum(parameter.nbytes for parameter in parameters)
            yield Problem(
                where="zero3",
                severity="warning",
                message=f"none of {len(parameters)} parameters is partitioned: this rank holds all"
                f" {nbytes:,} bytes until DeepSpeed's `initialize`",
                fix="Leave the loading to `streaming` or `zero3`.",
            )
        for name, parameter in model.named_parameters():
            if not partitions.is_partitioned(parameter):
                continue  # made after the load; DeepSpeed partitions it in `initialize`
            held: Any = parameter
            ranks = held.ds_process_group.size()
            size = Span.of(held.ds_shape.numel(), 0, ranks).size
            if (held.ds_tensor.ds_numel, parameter.numel()) != (size, 0):
                yield Problem(
                    where=name,
                    message=f"the rank holds {held.ds_tensor.ds_numel} elements beside"
                    f" {parameter.numel()}, where its part of {tuple(held.ds_shape)} over {ranks}"
                    f" ranks is {size}",
                    fix="A plugin after `zero3` changed it; report this to its makers.",
                )
        trained = {str(p.dtype)[6:] for p in model.parameters() if p.requires_grad}
        if len(trained) > 1:
            yield mixed_dtypes(trained)


def mixed_dtypes(found: Collection[str]) -> Problem:
    """Return the problem that DeepSpeed's ``initialize`` would stop with, as a bare assertion."""
    return Problem(
        where="zero3",
        message=f"trainable parameters are {' and '.join(sorted(found))}, and DeepSpeed keeps them"
        " in one buffer of one dtype",
        fix="Set `lora: {adapter_dtype: base}`, or cast what a plugin adds to the model's dtype.",
    )


class GlobalConfig(AbstractContextManager["GlobalConfig"]):
    """The one DeepSpeed config that transformers knows, ours for the length of a ``with`` block.

    transformers keeps it in a global weak reference, which every load of the process follows: gone
    too early, each rank loads the whole model; gone too late, the next model is partitioned too.
    In the block there is none until :meth:`activate`. One that the caller had set is back after it.
    """

    def __enter__(self) -> GlobalConfig:
        self._before = integration._hf_deepspeed_config_weak_ref
        self._ours: Any = None
        integration.unset_hf_deepspeed_config()
        return self

    def activate(self, config: dict[str, Any]) -> None:
        """Let transformers see ``config``, of stage 3, from here on.

        :raises LoadFailedError: it does not, and would load the whole model on every rank.
        """
        self._ours = integration.HfDeepSpeedConfig(config)
        if not integration.is_deepspeed_zero3_enabled():
            raise LoadFailedError(
                "transformers does not see the DeepSpeed config, and would load the whole model on"
                " every rank",
                fix="Report this with the versions of transformers, accelerate and deepspeed.",
            )

    def __exit__(self, *exc: object) -> None:
        self._ours = None
        integration._hf_deepspeed_config_weak_ref = self._before
