"""What a comparison is made of, and where the topics' comparisons are found."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .folders import folder

TOPICS = (
    "loading",
    "cold",
    "kbit",
    "groups",
    "colossalai",
    "zero3",
    "fsdp",
    "trust",
)
"""Modules of this package that have a ``TITLE`` and ``CASES``, in the order in which they run."""

OURS = "llmload"
"""The side that every other one is compared with."""

Mark = str | tuple[str, Mapping[str, float]]
Side = Callable[[Path], Any] | Callable[[Path], Iterator[Mark]] | str
"""What one side does with the checkpoint folder.

A function does the work in one go; what it returns is kept until memory has been read. A generator
function does it in phases that are measured one by one: ``yield "load"`` ends a phase and names it,
``yield "load", {"loss": 2.3}`` adds figures of its own. A text is a whole script in which
``{folder!r}`` stands for the folder, timed from start to exit.
"""


@dataclass(frozen=True)
class Case:
    """One comparison: sides that do the same work."""

    title: str
    sides: Mapping[str, Side]
    """By the name shown in the table; one of them is ``OURS``."""
    target: str
    """What ours is held to, in words."""
    final: Callable[[Path], float]
    """What one rank's part of the loaded model takes, in MiB."""
    checkpoint: Callable[[Path, str], Path] = folder
    """Makes the folder of a size below the working folder, if it is not there yet."""
    sizes: tuple[str, ...] = ("0.1B", "1.1B")
    """Sizes that are run where none is asked for."""
    imports: tuple[str, ...] = ()
    """Modules that every side needs and imports before the clock starts."""
    prepare: Callable[[], Any] | None = None
    """Called in each process after the imports, before the clock starts: to join the ranks."""
    ranks: int = 1
    """Processes that do the work together. Each has ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``,
    ``MASTER_ADDR`` and ``MASTER_PORT``, and its share of the threads."""
    stacks: tuple[str, ...] = ("modern",)
    """Stacks it can run on: ``modern`` is the interpreter that runs the benchmarks, others are
    named with ``--python``."""
    around: Callable[[Path], AbstractContextManager[Path]] = nullcontext
    """Entered around each run with the folder; gives the one that the run sees."""
    pss: bool = False
    """Also measure the proportional set size, in one more run of each side that is not timed,
    because taking it slows the process down. Always done with several ranks."""


def cases(topic: str) -> dict[str, Case]:
    """Return a topic's comparisons by name."""
    found: dict[str, Case] = _module(topic).CASES
    return found


def title(topic: str) -> str:
    """Return the heading of a topic's results."""
    found: str = _module(topic).TITLE
    return found


def _module(topic: str) -> Any:
    return importlib.import_module(f"{__package__}.{topic}")
