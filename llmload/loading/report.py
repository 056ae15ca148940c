"""What one load did: phases, seconds, memory, who made each parameter, versions."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, Field

from llmload.errors import Line


class Phase(BaseModel):
    """One step of a load, in the order in which they ran."""

    name: str
    """``plan``, a hook's name, or ``audit``."""
    plugin: str = ""
    """The plugin that did it; empty for the host's own work."""
    seconds: float
    """Wall time."""
    peak_rss_mib: float
    """The process's highest resident set size so far, in MiB (2**20 bytes), mapped pages too."""


class Report(BaseModel):
    """What one load did. ``result.report.model_dump_json()`` is its JSON form."""

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

    @property
    def seconds(self) -> float:
        """Wall time of all phases together."""
        return sum(phase.seconds for phase in self.phases)

    @contextmanager
    def phase(self, name: str, plugin: str = "") -> Iterator[None]:
        """Time a block and note the memory peak after it, also when it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases.append(
                Phase(
                    name=name,
                    plugin=plugin,
                    seconds=time.perf_counter() - start,
                    peak_rss_mib=peak_rss_mib(),
                )
            )

    def trainable_line(self) -> str:
        """Return the line that PEFT's ``print_trainable_parameters`` prints."""
        share = 100 * self.trainable / self.parameters if self.parameters else 0.0
        return (
            f"trainable params: {self.trainable:,d} || all params: {self.parameters:,d}"
            f" || trainable%: {share:.4f}"
        )


def peak_rss_mib() -> float:
    """Return the process's peak resident set size in MiB; Linux counts KiB, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
