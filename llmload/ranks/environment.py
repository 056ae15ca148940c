"""What a launcher says of this process, without importing torch."""

from __future__ import annotations

import os
import sys
from typing import Any, Final

LAUNCHER: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int | None:
    """Return the number of ranks, or None where no launcher has started any."""
    group = _group()
    if group is not None:
        return int(group.get_world_size())
    return int(os.environ["WORLD_SIZE"]) if launched() else None


def rank() -> int:
    """Return this process's rank; 0 where no launcher has started any."""
    group = _group()
    if group is not None:
        return int(group.get_rank())
    return int(os.environ["RANK"]) if launched() else 0


def launched() -> bool:
    """Say whether the environment has all that a process group is made of."""
    return all(name in os.environ for name in LAUNCHER)


def store_is_there() -> bool:
    """Say whether the ranks have a store that none has to wait for: a group's or the launcher's."""
    return _group() is not None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _group() -> Any:
    """Return ``torch.distributed`` where it has a process group; unimported it has none."""
    distributed: Any = sys.modules.get("torch.distributed")
    usable = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if usable else None
