"""What is asked of one load and what was found of its model: never changed again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel
    from transformers import PreTrainedModel

    from llmload.checkpoint import Checkpoint
    from llmload.checkpoint.untrusted import UntrustedFolder
    from llmload.context.machine import Machine
    from llmload.context.peers import Hooks, Peer
    from llmload.spec.loadspec import LoadSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Written by the host before any hook is called; read by everybody."""

    spec: LoadSpec
    """The validated spec."""
    sections: Mapping[str, BaseModel]
    """The active plugins' sections by name, with the defaults of those not in the spec."""
    active: tuple[str, ...]
    """Names of the plugins that take part, in plan order."""
    peers: Mapping[str, Peer]
    """What each active plugin declares of itself, by name, in plan order."""
    hooks: Hooks
    """Calls hooks that plugins declared themselves (``Hooks``), among the active plugins."""
    folder: Path
    """The model folder, or the snapshot of the hub repository; always local."""
    files: UntrustedFolder
    """The folder's small files that were read and checked; the load ends with ``files.check()``, so
    that what a library read again is what was checked."""
    model_class: type[PreTrainedModel]
    """The concrete class, never an ``Auto`` class."""
    dtype: torch.dtype
    """The floating-point dtype of the model; ``dtype: auto`` is resolved."""
    stored: Checkpoint | None
    """All tensors as they are stored; None with ``weights: random``."""
    machine: Machine
    """What the load is planned for; of a load itself the one that it runs on."""
    wraps_adapter: bool
    """Whether an active plugin will wrap the model in an adapter."""
