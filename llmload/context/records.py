"""What one run records: the rehearsal has one, and the load another, in which nothing is left."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmload.errors import Line

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from llmload.context.switch import AdapterSwitch
    from llmload.model.dry_run import ProbeResult


@dataclass(frozen=True, slots=True)
class Scope:
    """What a load, or all loads of one group, begin and end with."""

    until_end: ExitStack = field(default_factory=ExitStack)
    """Left when the last audit is over, or with the error that ended it all."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What plugins have in common for all members, by plugin name."""


@dataclass(slots=True, kw_only=True)
class Records:
    """What hooks leave behind while the model is made, for later hooks, the host and the report."""

    config: PretrainedConfig
    """A copy that belongs to this run, from which the model is built. Written in ``init_context``,
    not later; to change it for the plan too there is ``configure``. Read by everybody."""
    rehearsing: bool
    """True while the plan is made: the model is on the meta device and has no values. Written by
    the host; read by hooks that work on values."""
    scope: Scope = field(default_factory=Scope)
    """Of this load alone, or of the group that the model is a member of. What a plugin leaves in
    ``scope.kept`` under its name, the members after this one find there."""
    load_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for ``from_pretrained`` (``device_map``, ``quantization_config``). Written
    in ``init_context`` by any plugin; read by loaders, of which one that cannot honour an option
    declines."""
    placement: Any = None
    """Where and how the loader stores each weight; None for plain tensors. Written in
    ``init_context`` by the plugin named in ``placed_by``, or by the host for a group; one that
    splits may be wrapped by a later plugin: see ``llmload.plugin.Splitting``. Read by loaders."""
    without_memory: Callable[[], AbstractContextManager[Any]] | None = None
    """Makes the context under which the streaming loader builds the model that it fills; None for
    the meta device. Written in ``init_context`` by one plugin; read by ``model_to_fill``."""
    awaiting: str | None = None
    """Who will load the weights after this load. Written by a loader that leaves them out, in
    its ``check`` already, and then proves in its ``audit`` that they will all be found; read by the
    host's audit, and by who would save the model."""
    newly_initialised: dict[str, str] = field(default_factory=dict)
    """Name of each parameter or buffer that has no value from the checkpoint -> why, by its name in
    the model that the hook returns. Written by the hook that initialised it. The host takes the
    entries after each hook and follows the tensors, whatever becomes of their names."""
    unexpected: list[str] = field(default_factory=list)
    """Checkpoint keys for which there is no place in the model. Written by the loader; read by the
    host."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Key of a claimed tensor that nobody needs -> why. Written by the plugin that claimed it; read
    by the host."""
    changed_base: dict[str, str] = field(default_factory=dict)
    """Parameter of the finished model that an adapter needs otherwise than the checkpoint has it ->
    what changed it: with the adapter off it is not the base model. Written by the hook that changed
    it and taken by the host, as ``newly_initialised``; read by groups, and by audits, for which the
    host puts it back under the final names."""
    merged_into: dict[str, str] = field(default_factory=dict)
    """Parameter of the finished model that the load writes to for good, as a merge does -> why: it
    is no longer the checkpoint's, with an adapter off either. Written by the hook that does it, in
    the rehearsal too, and taken by the host, as ``newly_initialised``; read by groups, whose
    members have it each for itself."""
    adapter_switch: AdapterSwitch | None = None
    """Turns off the adapter of this model. Written in ``wrap_adapter``, in the rehearsal too, by a
    plugin whose adapter is not PEFT's; read by groups, for members with ``adapter_of``."""
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """JSON-able facts for plan or report, by plugin name. Written by ``record``; read by a plugin's
    own later hooks and by the host."""
    lines: list[Line] = field(default_factory=list)
    """What plugins show people of their facts. Written by ``show``; read by the host."""
    handed_on: MutableMapping[str, Any] = field(default_factory=dict)
    """What one hook of a plugin leaves for its own later hooks, by plugin name; what its ``check``
    left is found here too."""
    kept_alive: list[object] = field(default_factory=list)
    """What has to live as long as the model. Written by ``keep_alive``; read by the host."""
    read: set[str] = field(default_factory=set)
    """Claimed keys whose values were read. Written by ``read``; read by ``unused``."""
    filled: dict[int, torch.Tensor] = field(default_factory=dict)
    """Parameters that a plugin filled from the checkpoint, by identity. Written by
    ``from_checkpoint``; read by the host."""
    probed: ProbeResult | None = None
    """Of the finished model. Written by ``probe``, once."""
