"""What a load of several models will do: a plan for each, and what they will have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from llmload.context.forecast import PHASES
from llmload.context.machine import HERE, Machine
from llmload.errors import PlanError, Problem, some
from llmload.group import sharing
from llmload.group.sharing import Sharing
from llmload.loading.memory import PhasePeak
from llmload.loading.plan import Plan
from llmload.loading.planning import Download, prepare
from llmload.loading.prepared import Prepared
from llmload.spec.groupspec import ADAPTER_OF, AdapterSpec, GroupSpec, in_member, naming

if TYPE_CHECKING:
    from llmload.host.registry import Registry
    from llmload.loading.report import Report


class GroupPlan(BaseModel):
    """What a load of a group will do, and what stands in the way."""

    members: dict[str, Plan]
    """By name, in the order in which they will be loaded."""
    shared: list[Sharing] = Field(default_factory=list)
    """What members have in common."""
    apart: dict[str, str] = Field(default_factory=dict)
    """Members that read an earlier member's checkpoint, and why they get a cast of their own."""

    @property
    def problems(self) -> list[Problem]:
        """All members' errors and warnings, with the member's name."""
        return [in_member(name, p) for name, plan in self.members.items() for p in plan.problems]

    @property
    def errors(self) -> list[Problem]:
        """The problems that stop the load."""
        return [problem for problem in self.problems if problem.severity == "error"]

    @property
    def memory(self) -> list[PhasePeak]:
        """What one process is foretold to take for all members, what they share counted once.

        Members are loaded one after the other, and trained at the same time.
        """
        return list(_together(self))

    @property
    def saved_bytes(self) -> int:
        """Bytes that are saved once everything is loaded."""
        return sum(sharing.saved_bytes for sharing in self.shared)

    def raise_for_errors(self) -> None:
        """Raise :class:`PlanError` with all members' problems of severity ``error``."""
        if self.errors:
            raise PlanError(self.errors)


def _together(plan: GroupPlan) -> Iterator[PhasePeak]:
    """Yield the peak of each phase that any member has; what was loaded before stays."""
    foretold = [member.memory for member in plan.members.values() if member.memory is not None]
    pages = sum(each.saved_bytes for each in plan.shared if each.how == "checkpoint pages")
    casts = sum(each.saved_bytes for each in plan.shared if each.how == "one cast")
    for phase in PHASES:
        peaks = [memory.peak(phase) or memory.peak("use") for memory in foretold]
        found = [peak for peak in peaks if peak is not None]
        if not found or (phase == "train" and not any(m.peak("train") for m in foretold)):
            continue
        yield PhasePeak(
            phase=phase,
            host=sum(peak.host for peak in found) - casts,
            pages=sum(peak.pages for peak in found) - (pages if found[0].pages else 0),
            device=sum(peak.device for peak in found),
        )


@dataclass(frozen=True, kw_only=True)
class PreparedGroup:
    """A group's plan together with what it takes to carry it out."""

    plan: GroupPlan
    members: dict[str, Prepared]
    """Those that have a model of their own."""
    cast_once: dict[str, dict[str, int]]
    """By member: parameters that others cast alike, by their names in its base model -> elements.
    """


def prepare_group(
    spec: GroupSpec,
    registry: Registry,
    reports: Mapping[str, Report],
    *,
    download: Download,
    machine: Machine = HERE,
) -> PreparedGroup:
    """Make the plan of a group's load, reading no weight.

    :param reports: for the time that each member's plan takes.
    :raises RequestError: folder, config or class of a member are wrong.
    """
    members: dict[str, Prepared] = {}
    for name, own in spec.own_models().items():
        with naming(name), reports[name].phase("plan"):
            members[name] = prepare(own, registry, download=download, machine=machine)
    plan = GroupPlan(members={})
    for name, member in spec.models.items():
        if isinstance(member, AdapterSpec):
            _plan_adapter(name, member, members[member.adapter_of], plan)
        else:
            plan.members[name] = members[name].plan
    found = sharing.find(members)
    plan.shared += found.shared
    plan.apart = found.apart
    return PreparedGroup(plan=plan, members=members, cast_once=found.cast_once)


def prepare_group_to_load(
    spec: GroupSpec, registry: Registry, reports: Mapping[str, Report]
) -> PreparedGroup:
    """Make the plan of a group's load by headers, and where nothing stands in the way of any member
    fetch what they need.

    :raises RequestError: as :func:`prepare_group`.
    """
    prepared = prepare_group(spec, registry, reports, download=Download.UNFORESEEABLE)
    to_fetch = any(plan.to_fetch for plan in prepared.plan.members.values())
    if prepared.plan.errors or not to_fetch:
        return prepared
    return prepare_group(spec, registry, reports, download=Download.ALL)


def _plan_adapter(name: str, member: AdapterSpec, of: Prepared, plan: GroupPlan) -> None:
    """Plan a member that is another one's model, or say what stands in the way."""
    base = of.plan
    made = Plan(
        model=base.model,
        folder=base.folder,
        model_class=base.model_class,
        dtype=base.dtype,
        plugins={},
        trainable_parameters=[],
    )
    plan.members[name] = made
    if base.errors:
        return  # which stop the load anyway
    found = _adapter_problem(name, member, of)
    if found is not None:
        made.problems.append(found)
        return
    from llmload.group import adapter_view

    assert of.rehearsal is not None  # else there was a problem
    held = adapter_view.sizes(of.rehearsal.model, of.rehearsal.switch)
    made.parameters = base.parameters - (0 if member.frozen_copy else held.adapter)
    made.parameter_bytes = held.base_bytes + (held.adapter_bytes if member.frozen_copy else 0)
    plan.shared.append(
        Sharing(
            member=name,
            of=member.adapter_of,
            how="frozen copy" if member.frozen_copy else "adapter off",
            saved_bytes=held.base_bytes,
        )
    )


def _adapter_problem(name: str, member: AdapterSpec, of: Prepared) -> Problem | None:
    from llmload.group import adapter_view

    own = f"or load a second model with `like: {member.adapter_of}`"
    if of.rehearsal is None:
        message = (
            f"the load of {member.adapter_of!r} could not be rehearsed, so nothing is known of"
        )
        return Problem(
            where=ADAPTER_OF,
            message=f"{message} its adapter",
            fix=f"Load a second model with `like: {member.adapter_of}`.",
        )
    switch = of.rehearsal.switch
    reason = adapter_view.unsuited(of.rehearsal.model, switch)
    if reason is not None:
        return Problem(
            where=ADAPTER_OF,
            message=f"{member.adapter_of!r} {reason}",
            fix=f"Give it an adapter of PEFT, such as the section `lora`, {own}.",
        )
    if member.frozen_copy and switch is not None:
        return Problem(
            where=ADAPTER_OF,
            message=f"the adapter of {member.adapter_of!r} is not PEFT's, and can be turned off but"
            " not copied",
            fix=f"Remove `frozen_copy`, {own}.",
        )
    beside = adapter_view.trained_beside(of.rehearsal.model, switch)
    if beside:
        return Problem(
            where=ADAPTER_OF,
            message=f"{member.adapter_of!r} trains {some(beside)} beside its adapter, so that its"
            " first step would change this member too",
            fix=f"Freeze them, {own}.",
        )
    changed = list(of.rehearsal.changed_base)
    if changed and not member.frozen_copy:
        return Problem(
            where=ADAPTER_OF,
            message=f"the adapter of {member.adapter_of!r} brings base weights that are not the"
            f" checkpoint's ({some(changed)}), and turning it off leaves them",
            fix=f"Write `frozen_copy: true` for what {member.adapter_of!r} starts from, {own}.",
        )
    if member.frozen_copy and name in adapter_view.adapters(of.rehearsal.model):
        return Problem(
            where=ADAPTER_OF,
            message=f"{member.adapter_of!r} has an adapter called {name!r} already, and a frozen"
            " copy is called as its member",
            fix="Rename the member.",
        )
    return None
