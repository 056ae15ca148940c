"""The machine that a load is planned for: this one, or one that is only described."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from llmload.context import optimizers
from llmload.errors import Problem, RequestError
from llmload.spec.values import nbytes

_USUAL_RANKS_PER_HOST: Final = 8


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How many processes load, and what memory each host and accelerator has.

    What is left out is as it is here. A load itself is always planned for where it runs.

    :raises RequestError: a number or a size is none, or the optimizer is not known.
    """

    ranks: int | None = None
    """Processes that load together; by default those that the launcher started, else one."""
    ranks_per_host: int | None = None
    """Those that share a host's memory; by default the launcher's, or at most 8 of ``ranks``."""
    host_memory: int | str | None = None
    """Of each host: bytes, or a text such as ``512GB`` (10**9 bytes) or ``512GiB`` (2**30)."""
    device_memory: int | str | None = None
    """Of each rank's accelerator, likewise; given, there is one, whatever there is here."""
    optimizer: str = optimizers.DEFAULT
    """What the training would keep beside the parameters, by transformers' ``optim``; ``none`` for
    no training."""

    def __post_init__(self) -> None:
        problems = list(self._numbers())
        for name in ("host_memory", "device_memory"):
            text = getattr(self, name)
            try:
                object.__setattr__(self, name, None if text is None else _bytes(str(text), name))
            except RequestError as error:
                problems += error.problems
        try:
            optimizers.known(self.optimizer)
        except RequestError as error:
            problems += error.problems
        if problems:
            raise RequestError(problems)

    def _numbers(self) -> Iterator[Problem]:
        for name in ("ranks", "ranks_per_host"):
            number = getattr(self, name)
            if number is not None and number < 1:
                yield Problem(
                    where=name,
                    message=f"expected a number of processes, found {number}",
                    fix="Give 1 or more.",
                )

    @property
    def processes(self) -> int:
        """Ranks that load together."""
        return self.ranks or int(os.environ.get("WORLD_SIZE") or 1)

    @property
    def on_a_host(self) -> int:
        """Ranks that share a host's memory."""
        if self.ranks_per_host is not None:
            return min(self.ranks_per_host, self.processes)
        if self.ranks is not None:
            return min(self.ranks, _USUAL_RANKS_PER_HOST)
        return int(os.environ.get("LOCAL_WORLD_SIZE") or self.processes)

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is described, in any way, and so may not be this one."""
        return any((self.ranks, self.host_memory, self.device_memory))

    @property
    def is_accelerated(self) -> bool:
        """Whether each rank has an accelerator."""
        if self.is_elsewhere:
            return self.device_memory is not None
        import torch

        kinds = torch.accelerator if hasattr(torch, "accelerator") else torch.cuda  # since 2.6
        return bool(kinds.is_available())


def _bytes(text: str, where: str) -> int:
    found = nbytes(text)
    if found is None:
        raise RequestError(
            f"{text!r} is no amount of memory",
            fix="Write a number and a unit, such as 80GB (10**9 bytes) or 80GiB (2**30).",
            where=where,
        )
    return found


HERE: Final = Machine()
"""The one that this process runs on."""
