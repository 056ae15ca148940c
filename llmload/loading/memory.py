"""What a load is foretold to take of memory, as plan and report have it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class PhasePeak(BaseModel):
    """The most that one process has at a time in one phase, in bytes."""

    phase: Literal["load", "finish", "use", "train"]
    """``load``: the base model is loaded; ``finish``: plugins finish it; ``use``: every weight has
    been used once; ``train``: gradients and optimizer are there."""
    host: int
    """Memory of the host."""
    pages: int
    """Pages of the checkpoint's files, which are in memory once they were used and are given up
    where memory is short."""
    device: int
    """Memory of the accelerator."""


class Item(BaseModel):
    """One thing that takes memory."""

    what: str
    """In a few words."""
    plugin: str
    """Whose it is; empty for a training's."""
    phase: str
    """From when on, or when."""
    place: Literal["host", "device", "pages"]
    """Where."""
    nbytes: int
    """Bytes."""
    lasting: bool
    """Whether it stays."""


class Route(BaseModel):
    """How the values of one parameter get where they are."""

    name: str
    """In the finished model; of one that is replaced, in the base model."""
    shape: tuple[int, ...]
    """Of the whole."""
    stored_bytes: int
    """In the checkpoint."""
    kept_bytes: int
    """That this process has of it in the finished model."""
    route: str
    """``mapped``, ``cast``, ``copied``, ``assembled``, ``computed``, ``new``, ``replaced``, or a
    word of the plugin that stores it."""
    why: str
    """Why so."""
    plugin: str
    """The plugin that makes it."""


class Memory(BaseModel):
    """What one process is foretold to take; activations and what Python takes are not in it."""

    ranks: int
    """Processes that load together."""
    ranks_per_host: int
    """Those that share a host's memory."""
    host_memory: int | None = None
    """What a host has, where the plan was made for another machine."""
    device_memory: int | None = None
    """What an accelerator has, likewise."""
    optimizer: str
    """What the training is foretold with."""
    phases: list[PhasePeak] = Field(default_factory=list)
    """The peak of each phase."""
    items: list[Item] = Field(default_factory=list)
    """What the peaks are made of."""
    routes: list[Route] = Field(default_factory=list)
    """Every parameter, in the order of the finished model."""

    def peak(self, phase: str) -> PhasePeak | None:
        """Return the peak of one phase; None where it does not come."""
        return next((peak for peak in self.phases if peak.phase == phase), None)

    @property
    def while_loading(self) -> PhasePeak:
        """The peak of a load as a whole."""
        loading = [peak for peak in self.phases if peak.phase in ("load", "finish")]
        return PhasePeak(
            phase="load",
            host=max(peak.host for peak in loading),
            pages=max(peak.pages for peak in loading),
            device=max(peak.device for peak in loading),
        )
