"""What every hook of one load sees."""

from __future__ import annotations

import ast
import inspect
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from pydantic import BaseModel

from llmload import leaving
from llmload.context.asked import Asked
from llmload.context.blanks import Blanks
from llmload.context.found import Found
from llmload.context.machine import HERE, Machine
from llmload.context.records import Records, Scope
from llmload.errors import AuditError, Line

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import (
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )
    from typing_extensions import Self

    from llmload.checkpoint import Checkpoint, TensorInfo
    from llmload.checkpoint.accounting import Accounting
    from llmload.checkpoint.untrusted import UntrustedFolder
    from llmload.context.engine import Engine
    from llmload.context.peers import Hooks, Peer
    from llmload.context.switch import AdapterSwitch
    from llmload.model.dry_run import ProbeResult
    from llmload.spec.loadspec import LoadSpec

T = TypeVar("T")
SectionT = TypeVar("SectionT", bound=BaseModel)


class _ReadOnly(Generic[T]):
    # An attribute of one part of the context, under the same name. No docstring: ``help`` shows an
    # attribute's text, and that is the part's.

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        """The text that stands under it in the part, for ``help``."""
        return _described(_PARTS[self._part], self._name)

    def __init__(self, part: str) -> None:
        self._part = part

    def __set_name__(self, owner: type[LoadContext], name: str) -> None:
        self._name = name

    @overload
    def __get__(self, ctx: None, owner: type[LoadContext]) -> Self: ...
    @overload
    def __get__(self, ctx: LoadContext, owner: type[LoadContext]) -> T: ...
    def __get__(self, ctx: LoadContext | None, owner: type[LoadContext]) -> Self | T:
        if ctx is None:
            return self
        found: T = getattr(getattr(ctx, self._part), self._name)
        return found

    def __set__(self, ctx: LoadContext, value: T) -> None:
        # ``ctx.unexpected += keys`` sets what it was, once it has been added to.
        if value is not getattr(getattr(ctx, self._part), self._name):
            raise AttributeError(
                f"{self._name!r} of a LoadContext is not replaced;"
                " help(llmload.LoadContext) says who writes it"
            )


class _Stated(_ReadOnly[T]):
    # One that a plugin may set.

    __doc__ = _ReadOnly.__doc__  # a class without a docstring has None

    def __set__(self, ctx: LoadContext, value: T) -> None:
        setattr(getattr(ctx, self._part), self._name, value)


_PARTS = {"asked": Asked, "found": Found, "records": Records}


def _described(part: type, name: str) -> str | None:
    """Return what the source of a part says under one of its attributes."""
    (kind,) = ast.parse(inspect.getsource(part)).body
    for field, text in pairwise(getattr(kind, "body", ())):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=found)),
                ast.Expr(value=ast.Constant(value=str(words))),
            ) if found == name:
                return inspect.cleandoc(words)
    return None


class LoadContext:
    """One load: what is asked, what was found, and what the plugins hand on to each other.

    It has three parts, each with one owner, whose attributes are all found here by their own names;
    who writes each and who reads it stands with each. A name that is none of them is an
    ``AttributeError``, set or read. What a plugin keeps from one of its hooks for a later one goes
    to ``ctx.handed_on[self.name]``.

    - ``asked``: frozen;
    - ``found``: what ``map_keys`` and ``check`` found out, the same for plan and load;
    - ``records``: what one run records, another for the rehearsal than for the load.
    """

    __slots__ = ("__weakref__", "_blanks", "_engine", "asked", "found", "records")

    # --- asked ------------------------------------------------------------------------------------
    spec: _ReadOnly[LoadSpec] = _ReadOnly("asked")
    sections: _ReadOnly[Mapping[str, BaseModel]] = _ReadOnly("asked")
    active: _ReadOnly[tuple[str, ...]] = _ReadOnly("asked")
    peers: _ReadOnly[Mapping[str, Peer]] = _ReadOnly("asked")
    hooks: _ReadOnly[Hooks] = _ReadOnly("asked")
    folder: _ReadOnly[Path] = _ReadOnly("asked")
    files: _ReadOnly[UntrustedFolder] = _ReadOnly("asked")
    model_class: _ReadOnly[type[PreTrainedModel]] = _ReadOnly("asked")
    dtype: _ReadOnly[torch.dtype] = _ReadOnly("asked")
    machine: _ReadOnly[Machine] = _ReadOnly("asked")
    wraps_adapter: _ReadOnly[bool] = _ReadOnly("asked")

    # --- found while the plan is made -------------------------------------------------------------
    checkpoint: _ReadOnly[Checkpoint | None] = _ReadOnly("found")
    claimed: _ReadOnly[dict[str, TensorInfo]] = _ReadOnly("found")
    declined: _ReadOnly[dict[str, str]] = _ReadOnly("found")
    tokenizer: _Stated[PreTrainedTokenizerBase | None] = _Stated("found")
    processor: _Stated[ProcessorMixin | None] = _Stated("found")
    new_tokens: _Stated[dict[str, int]] = _Stated("found")
    placed_by: _Stated[str | None] = _Stated("found")
    splits: _Stated[bool] = _Stated("found")
    one_dtype: _Stated[bool] = _Stated("found")
    reads: _Stated[str] = _Stated("found")
    adapter_from: _Stated[Path | None] = _Stated("found")
    cast_later_by: _Stated[str] = _Stated("found")
    to_initialise: _ReadOnly[dict[str, str]] = _ReadOnly("found")
    apart: _ReadOnly[set[str]] = _ReadOnly("found")

    # --- recorded by one run ----------------------------------------------------------------------
    config: _ReadOnly[PretrainedConfig] = _ReadOnly("records")
    rehearsing: _ReadOnly[bool] = _ReadOnly("records")
    scope: _ReadOnly[Scope] = _ReadOnly("records")
    load_options: _ReadOnly[dict[str, Any]] = _ReadOnly("records")
    placement: _Stated[Any] = _Stated("records")
    without_memory: _Stated[Callable[[], AbstractContextManager[Any]] | None] = _Stated("records")
    awaiting: _Stated[str | None] = _Stated("records")
    newly_initialised: _ReadOnly[dict[str, str]] = _ReadOnly("records")
    unexpected: _ReadOnly[list[str]] = _ReadOnly("records")
    left_out: _ReadOnly[dict[str, str]] = _ReadOnly("records")
    changed_base: _ReadOnly[dict[str, str]] = _ReadOnly("records")
    merged_into: _ReadOnly[dict[str, str]] = _ReadOnly("records")
    adapter_switch: _Stated[AdapterSwitch | None] = _Stated("records")
    facts: _ReadOnly[dict[str, dict[str, Any]]] = _ReadOnly("records")
    lines: _ReadOnly[list[Line]] = _ReadOnly("records")
    handed_on: _ReadOnly[MutableMapping[str, Any]] = _ReadOnly("records")
    kept_alive: _ReadOnly[list[object]] = _ReadOnly("records")

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
        machine: Machine = HERE,
    ) -> None:
        self.asked = Asked(
            spec=spec,
            sections=sections,
            active=active,
            peers=peers,
            hooks=hooks,
            folder=folder,
            files=files,
            model_class=model_class,
            dtype=dtype,
            stored=checkpoint,
            machine=machine,
            wraps_adapter=wraps_adapter,
        )
        self._engine = engine
        self.found = Found(checkpoint=checkpoint)
        self._blanks = Blanks(self.asked, engine, config)
        # Of map_keys and check, whose findings are kept.
        self.records = Records(
            config=self._blanks.config(), rehearsing=True, handed_on=self.found.handed_on
        )

    def for_run(
        self, *, rehearsing: bool, placement: Any = None, scope: Scope | None = None
    ) -> LoadContext:
        """Return the context of a rehearsal or a load: all that was found, nothing recorded.

        :param placement: where weights are stored, unless a plugin says otherwise.
        :param scope: of the group that the model is a member of; else one of its own.
        """
        run = object.__new__(type(self))
        run.asked, run._engine, run.found = self.asked, self._engine, self.found
        run._blanks = self._blanks
        run.records = Records(
            config=self._blanks.config(),
            rehearsing=rehearsing,
            scope=scope or Scope(),
            placement=placement,
            handed_on=ChainMap({}, self.found.handed_on),
        )
        return run

    @property
    def hook(self) -> Any:
        """What :attr:`hooks` was before: pluggy's own callers. It warns, and goes."""
        leaving.warn("LoadContext.hook")
        return self.hooks.hook

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

    def providing(self, ability: str) -> list[str]:
        """Return the active plugins that declare an ability in ``provides``, in plan order."""
        return [name for name, peer in self.peers.items() if ability in peer.provides]

    # --- the model without storage ----------------------------------------------------------------

    def configure(self, **fields: Any) -> None:
        """Set fields of the config for plan and load alike.

        For ``map_keys`` and ``check``: what ``init_context`` changes, the rehearsal does not see,
        so a field that decides on names or shapes of parameters belongs here.
        """
        for name, value in fields.items():
            setattr(self.config, name, value)
        self._blanks.configure(fields)

    def untie(self) -> None:
        """Let the config, and that of its text part, say for plan and load that nothing is tied."""
        self._blanks.untie(self.config)

    @property
    def blank(self) -> PreTrainedModel:
        """The model on the meta device, weights not tied: names, shapes and dtypes to look at.

        For ``check``. A loader that fills one takes it with :meth:`take_blank`.
        """
        return self._blanks.blank(self.checkpoint)

    def take_blank(self) -> PreTrainedModel:
        """Return a blank model that belongs to the caller, built from ``config`` as it now is.

        The plan's own, where it was not used up and no plugin has changed the config since. In a
        load, a class that draws while it is built does so now.
        """
        return self._blanks.take(self.config, self.checkpoint, aside=self.rehearsing)

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
    def dequantised(self) -> bool:
        """Whether the folder is quantised and transformers makes plain numbers of it as it loads,
        so that nothing of the model is quantised. For ``check``."""
        return self._engine.dequantises(self.blank, self.config, self.spec, self.dtype)

    def accounting(self, model: PreTrainedModel) -> Accounting:
        """Return how the checkpoint's keys fit a blank model; found out once per config.

        For loaders, and for plugins that foretell what one will do.
        """
        assert self.checkpoint is not None
        return self._blanks.account(model, self.config, self.checkpoint)

    @property
    def accounted(self) -> Accounting | None:
        """What :meth:`accounting` found out, if it was asked and the config is the same."""
        return self._blanks.accounted(self.config)

    # --- what hooks do and say --------------------------------------------------------------------

    def probe(self, model: nn.Module) -> ProbeResult:
        """Return what :func:`llmload.model.dry_run.probe` finds of the finished model; run once.

        For ``audit``: the model does not change any more.

        :raises AuditError: its forward raises on token ids, and ``strict`` does not allow that.
        """
        if self.records.probed is None:
            from llmload.model.dry_run import probe  # needs torch

            self.records.probed = probe(model)
        probed = self.records.probed
        if self.spec.key_exceptions.allow_failing_forward:
            return probed
        if probed.raised:
            raise AuditError(
                f"the forward of {self.model_class.__name__} fails on a row of token ids:"
                f" {probed.raised}",
                fix="Mend the class or the config. If it takes other inputs, or is not meant to run"
                " yet, set `strict: {allow_failing_forward: true}`.",
            )
        if probed.clash and not self.cast_later_by:
            raise AuditError(
                f"the forward of {self.model_class.__name__} fails in the dtypes that its"
                " parameters have, under autocast too, and runs where all have one:"
                f" {probed.clash}",
                fix="Give them one with `dtype` or the section `cast`. If somebody casts them"
                " later, set `strict: {allow_failing_forward: true}`.",
            )
        return probed

    def read(self, key: str) -> torch.Tensor:
        """Return the values of a claimed tensor: on the CPU, as stored, the caller's own copy.

        :raises LookupError: the key was not claimed in ``map_keys``.
        """
        from llmload.checkpoint.mapped import MappedCheckpoint  # needs torch

        info = self.claimed[key]
        assert self.asked.stored is not None
        with MappedCheckpoint(self.asked.stored) as files:
            value = files.tensor(info).clone()
        self.records.read.add(key)
        return value

    def from_checkpoint(self, parameters: Iterable[nn.Parameter]) -> None:
        """Say that a plugin's own parameters have their values from the checkpoint.

        For ``post_load``, in the rehearsal too: plan and report then do not list them as new.
        """
        self.records.filled.update((id(parameter), parameter) for parameter in parameters)

    def is_from_checkpoint(self, parameter: nn.Parameter) -> bool:
        """Whether :meth:`from_checkpoint` was told of the parameter."""
        return id(parameter) in self.records.filled

    @property
    def unused(self) -> list[str]:
        """Claimed keys that were neither read nor left out with a reason."""
        return [key for key in self.claimed if key not in self.records.read | self.left_out.keys()]

    def keep_alive(self, thing: object) -> None:
        """Hold ``thing`` as long as the result of the load lives."""
        self.kept_alive.append(thing)

    def record(self, plugin: str, facts: Mapping[str, Any]) -> None:
        """Add JSON-able facts of a plugin to the report."""
        self.facts.setdefault(plugin, {}).update(facts)

    def show(self, plugin: str, label: str, text: str) -> None:
        """Add a line for people, of the plan while ``rehearsing``, else of the report."""
        self.lines.append(Line(plugin=plugin, label=label, text=text))
