"""Several models from one spec: all of them or none, and held once what need not be held twice."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

from pydantic import BaseModel, Field

from llmload.context.machine import HERE, Machine
from llmload.context.records import Scope
from llmload.group.planning import (
    GroupPlan,
    PreparedGroup,
    prepare_group,
    prepare_group_to_load,
)
from llmload.group.sharing import Sharing, conversion
from llmload.host.distributions import installed_versions
from llmload.host.registry import Registry, create_registry
from llmload.loading import turns, warned
from llmload.loading.pipeline import LoadResult, execute, undone_on_error
from llmload.loading.planning import Download
from llmload.loading.report import Report
from llmload.spec import files
from llmload.spec.groupspec import AdapterSpec, GroupSpec, naming


class GroupReport(BaseModel):
    """What one load of a group did."""

    members: dict[str, Report] = Field(default_factory=dict)
    """By name, in the order of the spec."""
    shared: list[Sharing] = Field(default_factory=list)
    """What members have in common."""
    seconds: float = 0.0
    """Wall time of the whole load."""

    @property
    def saved_bytes(self) -> int:
        """Bytes that are saved by what members have in common."""
        return sum(sharing.saved_bytes for sharing in self.shared)


class Group(Mapping[str, LoadResult]):
    """Loaded models by name, in the order of the spec."""

    def __init__(
        self, members: Mapping[str, LoadResult], plan: GroupPlan, report: GroupReport
    ) -> None:
        self._members = members
        self.plan = plan
        """What was going to happen."""
        self.report = report
        """What happened."""

    def __getitem__(self, name: str) -> LoadResult:
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


def plan_group(
    source: files.SpecLike, *, registry: Registry | None = None, machine: Machine = HERE
) -> GroupPlan:
    """Say what a load of the group would do, and what its members would share.

    :param source: path of a YAML or JSON file, a mapping, or a :class:`GroupSpec`.
    :param registry: the plugins to use; by default all installed ones.
    :param machine: what the load is to run on, where that is another one than this.
    :raises RequestError: the spec, a folder or a plugin it names is wrong. What else stands in the
        way is in ``plan.problems``.
    """
    registry = registry or create_registry()
    spec = registry.validate_group(source)
    with turns.taken("the plan of a group"):
        return prepare_group(
            spec, registry, _reports(spec), download=Download.NOTHING, machine=machine
        ).plan


def load_group(
    source: files.SpecLike, *, registry: Registry | None = None, prove: bool = True
) -> Group:
    """Load the models that a group asks for, each by its own plan and in its own contexts.

    Members that read the same checkpoint share memory where the plan says so: never so that a write
    to one of them could reach another.

    :param source: path of a YAML or JSON file, a mapping, or a :class:`GroupSpec`.
    :param registry: the plugins to use; by default all installed ones.
    :param prove: run the audits.
    :returns: a :class:`LoadResult` for each member; the model of one with ``adapter_of`` is an
        :class:`~llmload.group.adapter_view.AdapterView`.
    :raises RequestError: a member cannot be loaded as asked; no weight of any was read.
    :raises LoadFailedError: a plugin or library failed, or the audit found a model not as planned.
        Nothing of the whole group is left behind, and the random state is as before.
    """
    registry = registry or create_registry()
    with registry.telling(source):
        spec = registry.validate_group(source)
        registry.announce(source)
    with turns.taken("the load of a group"):
        return _load(spec, source, registry, prove=prove)


def _load(spec: GroupSpec, source: files.SpecLike, registry: Registry, *, prove: bool) -> Group:
    start = time.perf_counter()
    with registry.telling(source):
        report = GroupReport(members=_reports(spec))
        prepared = prepare_group_to_load(spec, registry, report.members)
        warned.say(p for p in prepared.plan.problems if p.severity == "warning")
        prepared.plan.raise_for_errors()
    loaded: dict[str, LoadResult] = {}
    try:
        scope, begun = Scope(), set[str]()
        with undone_on_error(), registry.telling(source, begun), scope.until_end:
            found = _load_models(prepared, loaded, report, scope, begun, prove=prove)
            for name, member in spec.models.items():
                if isinstance(member, AdapterSpec):
                    with naming(name):
                        loaded[name] = _view(name, member, prepared, loaded, report.members[name])
    except BaseException:
        # The traceback holds this frame, which would hold the models.
        loaded.clear()
        raise
    report.shared = [*_as_planned(prepared, report), *found]
    report.seconds = time.perf_counter() - start
    return Group({name: loaded[name] for name in spec.models}, prepared.plan, report)


def _reports(spec: GroupSpec) -> dict[str, Report]:
    return {name: Report() for name in spec.models}


def _load_models(
    prepared: PreparedGroup,
    loaded: dict[str, LoadResult],
    report: GroupReport,
    scope: Scope,
    begun: set[str],
    *,
    prove: bool,
) -> list[Sharing]:
    """Load the members that have a model of their own, and return what they did not cast again.

    :param begun: gets each plugin when its turn in ``init_context`` of a member has come.
    """
    from llmload.group import memory

    found: list[Sharing] = []
    with ExitStack() as stack:
        once = prepared.cast_once
        if once:
            room = memory.room_for(size for names in once.values() for size in names.values())
            pool = stack.enter_context(memory.Pool(room))
        for name, member in prepared.members.items():
            placement = None
            if name in once:
                placement = memory.Shared(pool, name, once[name], conversion(member.ctx))
            with naming(name):
                loaded[name] = execute(
                    member,
                    report.members[name],
                    begun,
                    prove=prove,
                    placement=placement,
                    scope=scope,
                )
                warned.say_rest(report.members[name], member.plan.warnings, name)
            for other, size in placement.found.items() if placement is not None else ():
                found.append(Sharing(member=name, of=other, how="one cast", saved_bytes=size))
    return found


def _view(
    name: str,
    member: AdapterSpec,
    prepared: PreparedGroup,
    loaded: Mapping[str, LoadResult],
    report: Report,
) -> LoadResult:
    """Make a member of another one's model."""
    from llmload.group import adapter_view

    other = loaded[member.adapter_of]
    plan = prepared.plan.members[name]
    with report.phase("wrap_adapter"):
        if member.frozen_copy:
            adapter_view.add_frozen_copy(other.model, name)
        view = adapter_view.AdapterView(
            other.model, name if member.frozen_copy else None, other.adapter_switch
        )
    report.versions = installed_versions()
    report.parameters, report.parameter_bytes = plan.parameters, plan.parameter_bytes
    what = f"the frozen adapter {name!r}" if member.frozen_copy else "no adapter"
    report.audit = [f"it is the model of {member.adapter_of!r} with {what} active"]
    return LoadResult(
        model=view,
        tokenizer=other.tokenizer,
        processor=other.processor,
        plan=plan,
        report=report,
        kept_alive=(other,),
    )


def _as_planned(prepared: PreparedGroup, report: GroupReport) -> Iterator[Sharing]:
    """Yield what is shared without being counted while loading."""
    for sharing in prepared.plan.shared:
        mapped = all(
            report.members[name].loader in prepared.members[name].ctx.providing("mapped_pages")
            for name in (sharing.member, sharing.of)
            if name in prepared.members
        )
        if sharing.how == "checkpoint pages" and not mapped:
            continue  # it declined when it came to loading
        if sharing.how != "one cast":
            yield sharing
