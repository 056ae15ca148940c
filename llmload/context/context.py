"""What every hook of one load sees."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from llmload.errors import AuditError, Line

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmload.checkpoint import Checkpoint, TensorInfo
    from llmload.checkpoint.accounting import Accounting
    from llmload.checkpoint.untrusted import UntrustedFolder
    from llmload.context.engine import Engine
    from llmload.context.peers import Hooks, Peer
    from llmload.model.dry_run import ProbeResult
    from llmload.spec.loadspec import LoadSpec

SectionT = TypeVar("SectionT", bound=BaseModel)


@dataclass(frozen=True)
class Scope:
    """What a load, or all loads of one group, begin and end with."""

    until_end: ExitStack = field(default_factory=ExitStack)
    """Left when the last audit is over, or with the error that ended it all."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What plugins have in common for all members, by plugin name."""


class LoadContext:
    """One load: what is asked, what was found, and what the plugins hand on to each other.

    The first group of attributes is read by every plugin and changed by none, except ``config`` in
    ``init_context``. The second group is where plugins leave something for others or the report.
    """

    def __init__(
        self,
        *,
        spec: LoadSpec,
        sections: Mapping[str, BaseModel],
        active: tuple[str, ...],
        hooks: Hooks,
        folder: Path,
        files: UntrustedFolder,
        config: PretrainedConfig,
        model_class: type[PreTrainedModel],
        dtype: torch.dtype,
        checkpoint: Checkpoint | None,
        wraps_adapter: bool,
        engine: Engine,
        peers: Mapping[str, Peer] = MappingProxyType({}),
    ) -> None:
        self.spec = spec
        """The validated spec."""
        self.sections = sections
        """The active plugins' sections by name, with the defaults of those not in the spec."""
        self.active = active
        """Names of the plugins that take part, in plan order."""
        self.peers = peers
        """What each active plugin declares of itself, by name, in plan order."""
        self.hooks = hooks
        """Calls hooks that plugins declared themselves (``Hooks``), among the active plugins."""
        self.folder = folder
        """The model folder, or the snapshot of the hub repository; always local."""
        self.files = files
        """The folder's small files that were read and checked; the load ends with
        ``files.check()``, so that what a library read again is what was checked."""
        self.config = config
        """A copy that belongs to this load. Change it in ``init_context``, not later."""
        self.model_class = model_class
        """The concrete class, never an ``Auto`` class."""
        self.dtype = dtype
        """The floating-point dtype of the model; ``dtype: auto`` is resolved."""
        self.checkpoint = checkpoint
        """Names, shapes, dtypes and places of the loader's tensors, with keys mapped; None with
        ``weights: random``. While ``map_keys`` is called, all tensors as they are stored."""
        self.wraps_adapter = wraps_adapter
        """Whether an active plugin will wrap the model in an adapter."""
        self.claimed: dict[str, TensorInfo] = {}
        """Tensors that a plugin took for itself in ``map_keys``, by their key there."""
        self.rehearsing = True
        """True while the plan is made: the model is on the meta device and has no values."""

        self.tokenizer: PreTrainedTokenizerBase | None = None
        """Set by the ``tokenizer`` plugin's ``check``."""
        self.declined: dict[str, str] = {}
        """Loader -> why its ``check``, or another plugin's for it, says that it will not load."""
        self.cast_later_by = ""
        """Who casts every parameter of floating point to ``dtype`` when training begins, codes of
        quantised weights too, as the ``check`` of the plugin says that prepares for it."""
        self.placed_by: str | None = None
        """The plugin that will set ``placement``, as its ``check`` says: a group then knows that it
        does not decide how this model's weights are stored."""
        self.splits = False
        """Set beside ``placed_by`` by a plugin whose placement is a ``Splitting``: another may then
        change how each weight is stored before it is split."""
        self.reads = ""
        """What of the checkpoint this process will read, in words, as the ``check`` of the plugin
        says that splits the weights; empty for all of it."""
        self.adapter_from: Path | None = None
        """The folder of the saved adapter that is resumed or merged, as the ``check`` of the plugin
        says that does it."""
        self.new_tokens: dict[str, int] = {}
        """Token -> id of those that the checkpoint's own tokenizer lacks, set with ``tokenizer``:
        their embedding rows are untrained, even where the checkpoint has rows to spare."""
        self.newly_initialised: dict[str, str] = {}
        """Name of each parameter or buffer that is not from the checkpoint -> why. Loaders fill it,
        and whoever makes new ones; see :meth:`moved` and :meth:`left_only`."""
        self.to_initialise: dict[str, str] = {}
        """Parameter of the base model that needs no value in the checkpoint -> why. Set in
        ``check`` by the plugin that answers for its value; ``strict`` then does not ask for it."""
        self.changed_base: dict[str, str] = {}
        """Parameter of the finished model that an adapter needs otherwise than the checkpoint has
        it -> what changed it: with the adapter off it is not the base model."""
        self.unexpected: list[str] = []
        """Checkpoint keys for which the loader found no place in the model."""
        self.left_out: dict[str, str] = {}
        """Key of a claimed tensor that nobody needs -> why, set by the plugin that claimed it."""
        self.load_options: dict[str, Any] = {}
        """Keyword arguments for ``from_pretrained``, set in ``init_context`` (``device_map``,
        ``quantization_config``). A loader that cannot honour one declines."""
        self.placement: Any = None
        """The streaming engine's placement, set in ``init_context`` by the plugin that decides
        where and how each weight is stored; None for plain tensors. One that splits may be wrapped
        by a later plugin: see ``checkpoint.placement.Splitting``."""
        self.without_memory: Callable[[], AbstractContextManager[Any]] | None = None
        """Makes the context under which the streaming loader builds the model that it fills, set in
        ``init_context``; None for the meta device."""
        self.awaiting: str | None = None
        """Who will load the weights after this load, set by a loader that leaves them out; it then
        proves in its ``audit`` that they will all be found."""
        self.facts: dict[str, Any] = {}
        """JSON-able facts for the report, by plugin name."""
        self.lines: list[Line] = []
        """What plugins show people of their facts: see :meth:`show`."""
        self.handed_on: dict[str, Any] = {}
        """What a plugin's ``check`` found out for its own later hooks, by plugin name."""
        self.scope = Scope()
        """Of this load alone, or of the group that the model is a member of. What a plugin leaves
        in ``scope.kept`` under its name, the members after this one find there."""
        self.kept_alive: list[object] = []
        self._engine = engine
        self._stored = checkpoint
        self._read: set[str] = set()
        self._filled: dict[int, nn.Parameter] = {}
        self._probed: ProbeResult | None = None
        self._pristine = copy.deepcopy(config)
        self._blank: PreTrainedModel | None = None
        self._blank_draws = False
        self._accounting: Accounting | None = None

    @property
    def until_end(self) -> ExitStack:
        """Contexts that outlast those of ``init_context``: left when the audit is over, in a group
        the last member's, or with the error that ended it. What they raise then fails the load."""
        return self.scope.until_end

    def section(self, kind: type[SectionT]) -> SectionT:
        """Return this load's section of the given model: what the spec says, or its defaults.

        :raises LookupError: no active plugin owns a section of this kind.
        """
        for value in self.sections.values():
            if isinstance(value, kind):
                return value
        raise LookupError(f"no active plugin has a section of type {kind.__qualname__}")

    def configure(self, **fields: Any) -> None:
        """Set fields of the config for plan and load alike.

        For ``map_keys`` and ``check``: what ``init_context`` changes, the rehearsal does not see,
        so a field that decides on names or shapes of parameters belongs here.
        """
        for config in (self.config, self._pristine):
            for name, value in fields.items():
                setattr(config, name, value)
        self._blank = self._accounting = None

    @property
    def blank(self) -> PreTrainedModel:
        """The model on the meta device, weights not tied: names, shapes and dtypes to look at.

        For ``check``. A loader that fills one takes it with :meth:`take_blank`.
        """
        if self._blank is None:
            self._blank, self._blank_draws = self._build_aside()
        return self._blank

    def _build_aside(self) -> tuple[PreTrainedModel, bool]:
        """Build a blank model that no load hands out, and say whether its class draws meanwhile.

        The random stream does not move: the plan must leave it to the load, which draws as often as
        ``from_pretrained``. On the meta device few classes draw at all (DiffLlama does).
        """
        import torch

        with torch.random.fork_rng(devices=[]):
            before = torch.get_rng_state()
            blank = self._build()
            return blank, not torch.equal(before, torch.get_rng_state())

    def take_blank(self) -> PreTrainedModel:
        """Return a blank model that belongs to the caller, built from ``config`` as it now is.

        The plan's own, where it was not used up and no plugin has changed the config since. In a
        load, a class that draws while it is built does so now.
        """
        blank, self._blank = self._blank, None
        if blank is not None and self._config_changed:
            blank = None
        if self.rehearsing:
            return self._build_aside()[0] if blank is None else blank
        return self._build() if blank is None or self._blank_draws else blank

    def _build(self) -> PreTrainedModel:
        stored = () if self.checkpoint is None else self.checkpoint.names
        asked = self.spec.dtype != "auto"
        return self._engine.blank(
            self.model_class, self.config, self.dtype, stored=stored, asked=asked
        )

    def model_to_fill(self) -> PreTrainedModel:
        """Return the model for a loader to fill, its parameters without memory.

        They are on the meta device, or as the context keeps them that a plugin set in
        ``without_memory``.
        """
        if self.without_memory is None:
            return self._engine.to_fill(self.take_blank())
        asked = self.spec.dtype != "auto"
        return self._engine.built_under(
            self.without_memory(), self.model_class, self.config, self.dtype, asked=asked
        )

    def blank_of(self, config: PretrainedConfig) -> PreTrainedModel:
        """Return the model's class built of another config on the meta device, weights not tied.

        :raises CheckpointError: the class refuses the config.
        """
        return self._engine.blank(self.model_class, config, self.dtype, stored=(), asked=True)

    @property
    def _config_changed(self) -> bool:
        """Whether a plugin has changed the config since the plan began."""
        # As dicts: comparing configs whose layers differ raises.
        return bool(self.config.to_dict() != self._pristine.to_dict())

    def accounting(self, model: PreTrainedModel) -> Accounting:
        """Return how the checkpoint's keys fit a blank model; found out once per config.

        For loaders, and for plugins that foretell what one will do.
        """
        unchanged = not self._config_changed
        if unchanged and self._accounting is not None:
            return self._accounting
        assert self.checkpoint is not None
        found = self._engine.account(model, self.checkpoint, tied=model is not self._blank)
        if unchanged:
            self._accounting = found
        return found

    def probe(self, model: nn.Module) -> ProbeResult:
        """Return what :func:`llmload.model.dry_run.probe` finds of the finished model; run once.

        For ``audit``: the model does not change any more.

        :raises AuditError: its forward raises on token ids, and ``strict`` does not allow that.
        """
        if self._probed is None:
            from llmload.model.dry_run import probe  # needs torch

            self._probed = probe(model)
        if self._probed.raised and not self.spec.key_exceptions.allow_failing_forward:
            raise AuditError(
                f"the model's forward fails on a row of token ids: {self._probed.raised}",
                fix="Mend the class or the config. If it takes other inputs, or is not meant to run"
                " yet, set `strict: {allow_failing_forward: true}`.",
            )
        return self._probed

    def read(self, key: str) -> torch.Tensor:
        """Return the values of a claimed tensor: on the CPU, as stored, the caller's own copy.

        :raises LookupError: the key was not claimed in ``map_keys``.
        """
        from llmload.checkpoint.mapped import MappedCheckpoint  # needs torch

        info = self.claimed[key]
        assert self._stored is not None
        with MappedCheckpoint(self._stored) as files:
            value = files.tensor(info).clone()
        self._read.add(key)
        return value

    def from_checkpoint(self, parameters: Iterable[nn.Parameter]) -> None:
        """Say that a plugin's own parameters have their values from the checkpoint.

        For ``post_load``, in the rehearsal too: plan and report then do not list them as new.
        """
        self._filled.update((id(parameter), parameter) for parameter in parameters)

    def is_from_checkpoint(self, parameter: nn.Parameter) -> bool:
        """Whether :meth:`from_checkpoint` was told of the parameter."""
        return id(parameter) in self._filled

    @property
    def unused(self) -> list[str]:
        """Claimed keys that were neither read nor left out with a reason."""
        return [key for key in self.claimed if key not in self._read | self.left_out.keys()]

    def keep_alive(self, thing: object) -> None:
        """Hold ``thing`` as long as the result of the load lives."""
        self.kept_alive.append(thing)

    def record(self, plugin: str, facts: Mapping[str, Any]) -> None:
        """Add JSON-able facts of a plugin to the report."""
        self.facts.setdefault(plugin, {}).update(facts)

    def moved(self, prefix: str) -> None:
        """Say that a plugin put the model into another module, where its names have a prefix."""
        self.newly_initialised = {f"{prefix}{n}": why for n, why in self.newly_initialised.items()}
        self.changed_base = {f"{prefix}{n}": why for n, why in self.changed_base.items()}

    def left_only(self, names: Container[str]) -> None:
        """Say that a plugin took parameters out of the model: these are its names by now."""
        self.newly_initialised = {n: w for n, w in self.newly_initialised.items() if n in names}
        self.changed_base = {n: w for n, w in self.changed_base.items() if n in names}

    def show(self, plugin: str, label: str, text: str) -> None:
        """Add a line for people, of the plan while ``rehearsing``, else of the report."""
        self.lines.append(Line(plugin=plugin, label=label, text=text))

    def providing(self, ability: str) -> list[str]:
        """Return the active plugins that declare an ability in ``provides``, in plan order."""
        return [name for name, peer in self.peers.items() if ability in peer.provides]

    def for_loading(self) -> LoadContext:
        """Return the context of the load itself: same request, untouched config, nothing recorded.

        Tokenizer, blank model and what plugins handed on are kept; the records of the rehearsal are
        left behind.
        """
        loading = copy.copy(self)
        loading.config = copy.deepcopy(self._pristine)
        loading.rehearsing = False
        loading.newly_initialised = {}
        loading.unexpected = []
        loading.left_out = {}
        loading._read = set()
        loading._filled = {}
        loading.load_options = {}
        loading.placement = None
        loading.without_memory = None
        loading.awaiting = None
        loading.facts = {}
        loading.changed_base = {}
        loading.lines = []
        loading.scope = Scope()
        loading.kept_alive = []
        loading._probed = None
        return loading
