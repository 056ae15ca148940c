"""What one load did: phases, seconds, memory, who made each parameter, versions."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, Field

from llmload.errors import Line
from llmload.loading.memory import Memory

_LOGGER = logging.getLogger("llmload")


class Phase(BaseModel):
    """One step of a load, in the order in which they ran."""

    name: str
    """``plan``, a hook's name, or ``audit``."""
    plugin: str = ""
    """The plugin that did it; empty for the host's own work."""
    start: float = 0.0
    """Seconds after the load began."""
    seconds: float
    """Wall time."""
    peak_rss_mib: float
    """The process's highest resident set size so far, in MiB (2**20 bytes), mapped pages too."""
    rss_mib: float = 0.0
    """Its resident set size at the end; 0 where this system does not tell."""
    anonymous_mib: float = 0.0
    """What of it is no page of a file, likewise."""
    device_mib: float = 0.0
    """The most that torch has had on the accelerator so far, in MiB."""


class Beside(NamedTuple):
    """What was foretold of one place, and what a load took, in bytes."""

    foretold: int
    measured: int
    """Above what the process had when its plan was made."""
    rose: bool
    """Whether it is more than the process ever had before; else the load took at most so much."""


class Report(BaseModel):
    """What one load did. ``result.report.model_dump_json()`` is its JSON form."""

    model: str = ""
    """The spec's ``model``."""
    folder: str = ""
    """The local folder that was read."""
    commit: str = ""
    """Of the hub repository, where it is one's snapshot."""
    spec: dict[str, Any] = Field(default_factory=dict)
    """What was asked for."""
    phases: list[Phase] = Field(default_factory=list)
    """In the order in which they ended; a failed load's report ends with the phase that failed."""
    loader: str = ""
    """The plugin that loaded the base model."""
    declined: dict[str, str] = Field(default_factory=dict)
    """Loaders that declined before the one that loaded, with the reason each gave."""
    declined_adapters: dict[str, str] = Field(default_factory=dict)
    """Adapter plugins that declined, with the reason each gave."""
    plugins: dict[str, str] = Field(default_factory=dict)
    """Plugins in plan order -> distribution and version."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Installed versions of Python and the stack's libraries."""
    memory: Memory | None = None
    """What the plan foretold."""
    before: Phase | None = None
    """What the process had when the plan was made."""
    parameters: int = 0
    """Number of elements in all parameters, tied ones once."""
    trainable: int = 0
    """Number of elements in the parameters that require gradients."""
    parameter_bytes: int = 0
    """Bytes of all parameters, tied ones once."""
    checkpoint_bytes: int = 0
    """Bytes of all tensors in the checkpoint."""
    newly_initialised: dict[str, str] = Field(default_factory=dict)
    """Parameters and buffers whose values are not from the checkpoint -> why or by whom."""
    left_out: dict[str, str] = Field(default_factory=dict)
    """Keys of the checkpoint whose tensors the model does not get -> why."""
    compared: int = 0
    """Tensors of the checkpoint that the model handed out has as they are stored, after the
    declared cast: by their first and last values. ``audit`` says of how many."""
    audit: list[str] = Field(default_factory=list)
    """What the audit proved, and what it could not look at, one sentence each."""
    warnings: list[str] = Field(default_factory=list)
    """Problems of severity ``warning``."""
    facts: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What plugins recorded, by plugin."""
    lines: list[Line] = Field(default_factory=list)
    """What plugins want people to see of their facts."""

    @cached_property
    def began(self) -> float:
        """The clock when the first phase began; no part of what a report says."""
        return time.perf_counter()

    def __repr__(self) -> str:
        return f"<Report of {self.model!r}: {self.seconds:.2f} s, {self.parameters:,} parameters>"

    def __str__(self) -> str:
        from llmload.loading import printed  # needs rich

        return printed.text(printed.report(self))

    def _repr_html_(self) -> str:
        from llmload.loading import page  # needs jinja2

        return page.of_load(None, [self])

    @property
    def seconds(self) -> float:
        """Wall time of all phases together."""
        return sum(phase.seconds for phase in self.phases)

    @contextmanager
    def phase(self, name: str, plugin: str = "") -> Iterator[None]:
        """Time a block and note the memory peak after it, also when it raises."""
        began, start = self.began, time.perf_counter()
        try:
            yield
        finally:
            done = _seen(name, plugin, start, began)
            self.phases.append(done)
            by = f" by {plugin}" if plugin else ""
            _LOGGER.info("%s%s: %.2f s, %.0f MiB", name, by, done.seconds, done.rss_mib)

    def take_reading(self) -> None:
        """Note what the process has before the load takes anything."""
        self.before = _seen("", "", time.perf_counter(), self.began)

    def foretold_and_measured(self) -> dict[str, Beside]:
        """Return, of ``host`` and ``accelerator``, what was foretold and what the load took.

        Pages of files count once a load has looked at them, and it looks at few.
        """
        if self.memory is None or self.before is None or not self.phases:
            return {}
        last, before, foretold = self.phases[-1], self.before, self.memory.while_loading
        found = {
            "host": Beside(
                foretold.host,
                _bytes(last.peak_rss_mib - before.rss_mib),
                last.peak_rss_mib > before.peak_rss_mib,
            )
        }
        if foretold.device or last.device_mib:
            taken = last.device_mib - before.device_mib
            found["accelerator"] = Beside(foretold.device, _bytes(taken), taken > 0)
        return found

    def trainable_line(self) -> str:
        """Return the line that PEFT's ``print_trainable_parameters`` prints."""
        share = 100 * self.trainable / self.parameters if self.parameters else 0.0
        return (
            f"trainable params: {self.trainable:,d} || all params: {self.parameters:,d}"
            f" || trainable%: {share:.4f}"
        )


def _seen(name: str, plugin: str, start: float, began: float) -> Phase:
    """Return a phase that has just ended, with what the process has now."""
    now = _status()
    return Phase(
        name=name,
        plugin=plugin,
        start=max(0.0, start - began),
        seconds=time.perf_counter() - start,
        peak_rss_mib=peak_rss_mib(),
        rss_mib=now.get("VmRSS", 0) / 2**10,
        anonymous_mib=now.get("RssAnon", 0) / 2**10,
        device_mib=_device_mib(),
    )


def _status() -> dict[str, int]:
    """Return the KiB that Linux tells of this process."""
    found = {}
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            key, _, text = line.partition(":")
            if key in ("VmRSS", "RssAnon"):
                found[key] = int(text.split()[0])
    return found


def _device_mib() -> float:
    torch = sys.modules.get("torch")  # what nobody has imported has nothing there
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0.0
    return float(torch.cuda.max_memory_allocated()) / 2**20


def _bytes(mib: float) -> int:
    return max(0, round(mib * 2**20))


def peak_rss_mib() -> float:
    """Return the process's peak resident set size in MiB; Linux counts KiB, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
