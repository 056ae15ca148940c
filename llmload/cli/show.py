"""Plan, report and lists for people, made with rich: a choice of what the JSON has in full."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmload.loading.wording import pattern, size_text

if TYPE_CHECKING:
    from llmload.cli.demo import Demonstration, FineTuning
    from llmload.cli.doctor import Diagnoses
    from llmload.cli.environment import Environment, HookList, PluginList
    from llmload.cli.explaining import Explanation
    from llmload.cli.inspecting import Inspection, StoredTensor, Targets
    from llmload.errors import Problem
    from llmload.group.loading import GroupReport
    from llmload.group.planning import GroupPlan
    from llmload.group.sharing import Sharing
    from llmload.loading.plan import Plan
    from llmload.loading.report import Report

_SHARED = {
    "checkpoint pages": "{member} and {of} lie on the checkpoint's own pages",
    "one cast": "{member} takes what was cast for {of}",
    "adapter off": "{member} is {of} with its adapter off",
    "frozen copy": "{member} is {of} with a frozen copy of its adapter",
}
_COLOURS = {
    **dict.fromkeys(("error", "broken", "does not work"), "red"),
    **dict.fromkeys(("warning", "works in part"), "yellow"),
    **dict.fromkeys(("active", "works"), "green"),
}


def plan(plan: Plan) -> RenderableType:
    """Render what a load will do."""
    facts = _pairs()
    facts.add_row("model", f"{plan.model_class}, {plan.dtype}")
    facts.add_row("folder", plan.folder)
    if plan.checkpoint_tensors:
        size = f"{plan.checkpoint_tensors} tensors, {size_text(plan.checkpoint_bytes)}"
        facts.add_row("checkpoint", size)
    if plan.to_fetch:
        size = size_text(sum(plan.to_fetch.values()))
        facts.add_row("to fetch", f"{len(plan.to_fetch)} files, {size}")
    for line in plan.keys:
        facts.add_row("keys", line)
    if plan.loader:
        facts.add_row("loader", plan.loader)
    for name, reason in plan.declined.items():
        facts.add_row("declined", f"{name}: {reason}")
    if plan.parameters:
        facts.add_row("parameters", f"{plan.parameters:,}, {size_text(plan.parameter_bytes)}")
        facts.add_row("trainable", _trainable(plan))
    for shown in plan.lines:
        facts.add_row(shown.label, shown.text)
    for name in _made_by(plan.new_parameters):
        facts.add_row("new", name)

    steps = _table("step", "plugin", last="what it does")
    for step in plan.steps:
        steps.add_row(step.hook, step.plugin, Text("\n".join(step.notes)))
    return Group(facts, *([steps] if plan.steps else []), *_problems(plan.problems))


def report(report: Report) -> RenderableType:
    """Render what a load did."""
    phases = Table(box=box.SIMPLE_HEAD, show_footer=True)
    phases.add_column("phase", "all", no_wrap=True)
    phases.add_column("plugin", no_wrap=True)
    phases.add_column("seconds", f"{report.seconds:.2f}", justify="right")
    peak = max((phase.peak_rss_mib for phase in report.phases), default=0.0)
    phases.add_column("peak RSS, MiB", f"{peak:.0f}", justify="right")
    for phase in report.phases:
        phases.add_row(
            phase.name, phase.plugin, f"{phase.seconds:.2f}", f"{phase.peak_rss_mib:.0f}"
        )

    facts = _pairs()
    if report.loader:
        facts.add_row("loader", report.loader)
    for name, reason in report.declined.items():
        facts.add_row("declined", f"{name}: {reason}")
    facts.add_row("parameters", f"{report.parameters:,}, {size_text(report.parameter_bytes)}")
    for name in _made_by(report.newly_initialised):
        facts.add_row("new", name)
    for shown in report.lines:
        facts.add_row(shown.label, shown.text)
    for name in _made_by(report.left_out):
        facts.add_row("left out", name)
    for line in report.audit:
        facts.add_row("proved", line)
    return Group(phases, facts, Text(report.trainable_line()))


def inspection(found: Inspection, *, every: bool) -> RenderableType:
    """Render what lies in the folder of a model, names that differ in their numbers once."""
    facts = _pairs()
    facts.add_row("model", found.model)
    facts.add_row("folder", found.folder)
    for key, value in found.config.items():
        facts.add_row(key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    for name, size in found.files.items():
        here = ", not here yet" if name in found.to_fetch else ""
        facts.add_row("file", f"{name}, {size_text(size)}{here}")
    for dtype, (elements, nbytes) in found.by_dtype().items():
        facts.add_row("weights", f"{elements:,} of {dtype}, {size_text(nbytes)}")
    table = _table("dtype", "shape", "size", last="tensors")
    groups: dict[tuple[str, str, tuple[int, ...]], list[StoredTensor]] = {}
    for tensor in found.tensors:
        name = tensor.name if every else pattern(tensor.name)
        groups.setdefault((name, tensor.dtype, tensor.shape), []).append(tensor)
    for (name, dtype, shape), members in groups.items():
        together = size_text(sum(tensor.nbytes for tensor in members))
        table.add_row(dtype, _shape(shape), together, _counted(name, len(members)))
    return Group(facts, table)


def targets(found: Targets) -> RenderableType:
    """Render the modules that an adapter could go on."""
    table = _table("class", "weight", "size", "lora", last="modules")
    for modules in found.modules:
        shapes = modules.shapes.get("weight") or next(iter(modules.shapes.values()))
        count = len(modules.names)
        taken = f"{modules.adapted} of {count}" if modules.adapted else ""
        table.add_row(
            modules.kind,
            " or ".join(map(_shape, shapes)),
            size_text(modules.nbytes),
            taken,
            _counted(modules.pattern, count),
        )
    return Group(_heading(found.model_class), table)


def _counted(name: str, count: int) -> str:
    return f"{name} ({count})" if count > 1 else name


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one value"


def group_plan(plans: GroupPlan) -> RenderableType:
    """Render what a load of several models will do."""
    members = [
        part
        for name, made in plans.members.items()
        for part in (_heading(name), plan(made.model_copy(update={"problems": []})))
    ]
    facts = _shared(plans.shared)
    for name, reason in plans.apart.items():
        facts.add_row("not shared", f"{name}: {reason}")
    return Group(*members, facts, *_problems(plans.problems))


def group_report(reports: GroupReport) -> RenderableType:
    """Render what a load of several models did."""
    members = [
        part for name, made in reports.members.items() for part in (_heading(name), report(made))
    ]
    return Group(*members, _heading("together"), _shared(reports.shared))


def _shared(shared: Iterable[Sharing]) -> Table:
    facts = _pairs()
    for found in shared:
        what = _SHARED[found.how].format(member=found.member, of=found.of)
        until = "" if found.lasting else ", until a training step writes them"
        facts.add_row("shared", f"{what}: {size_text(found.saved_bytes)} saved{until}")
    return facts


def plugins(listed: PluginList) -> RenderableType:
    """Render the plugins as a table, the active ones in plan order."""
    table = _table("plugin", "distribution", "key", "status", last="hooks, or what is wrong")
    for entry in listed.plugins:
        table.add_row(
            entry.name,
            entry.distribution,
            "yes" if entry.section else "",
            Text(entry.status, _COLOURS.get(entry.status, "")),
            Text(entry.reason or ", ".join(entry.hooks)),
        )
    return Group(table, *_problems(listed.problems))


def hooks(listed: HookList) -> RenderableType:
    """Render who implements what, in lines that no terminal breaks: people click on the code."""
    lines = [
        f"{entry.hook}  {entry.plugin} ({entry.distribution}){', wrapper' * entry.wrapper}"
        f"  {entry.code}"
        for entry in listed.hooks
    ]
    return "\n".join(lines) or "nobody"


def diagnoses(found: Diagnoses) -> RenderableType:
    """Render what works here, and the way to what does not."""
    versions = _pairs()
    for name, version in found.versions.items():
        versions.add_row(name, version)
    table = _table("plugin", "here", last="what works, and how to get the rest")
    for diagnosis in found.plugins:
        lines = [*diagnosis.works, *map(str, diagnosis.problems)]
        health = Text(diagnosis.health, _COLOURS.get(diagnosis.health, ""))
        table.add_row(diagnosis.name, health, Text("\n".join(lines)))
    return Group(versions, table, *_problems(found.problems))


def explanation(found: Explanation) -> RenderableType:
    """Render what a key means, and the keys in it."""
    facts = _pairs()
    for label, text in (
        ("key", found.key),
        ("takes", found.takes),
        ("default", found.default),
        ("example", "; ".join(map(str, found.examples))),
        ("plugin", found.plugin),
        ("needs", ", ".join(found.needs)),
    ):
        if text:
            facts.add_row(label, text)
    for conflict in found.conflicts:
        facts.add_row("not with", conflict)
    parts: list[RenderableType] = [facts, Text(f"\n{_prose(found.meaning)}")]
    if found.keys:
        table = _table("key", "default", last="what it takes, and what it does")
        for key in found.keys:
            table.add_row(key.name, key.default, Text(f"{key.takes}\n{_prose(key.meaning)}"))
        parts.append(table)
    return Group(*parts)


def _prose(docstring: str) -> str:
    """Return a docstring as paragraphs of one line each, code between single backticks."""
    paragraphs = (" ".join(part.split()) for part in docstring.split("\n\n"))
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", "\n\n".join(paragraphs)).replace("``", "`")


def environment(environment: Environment) -> str:
    """Return the environment as lines to paste, not as a table."""
    lines = [f"{name}: {version}" for name, version in environment.versions.items()]
    lines.append(f"platform: {environment.platform}")
    lines.append(f"processors: {environment.processors}")
    lines.append(f"memory: {size_text(environment.memory_bytes)}")
    lines += [f"device: {device}" for device in environment.devices or ["none beside the CPU"]]
    lines += [f"{name}={value}" for name, value in environment.variables.items()]
    for entry in environment.plugins:
        reason = f": {entry.reason}" if entry.reason else ""
        lines.append(f"plugin {entry.name} ({entry.distribution}): {entry.status}{reason}")
    return "\n".join(lines)


def demonstration(shown: Demonstration) -> RenderableType:
    """Render a demo as the story it is."""
    made, tuned = shown.training, shown.fine_tuning
    return Group(
        _heading("1 A small model, trained on what ships with Python"),
        Text(
            f"{made.parameters:,} parameters, {made.steps} steps on {made.characters:,} characters"
            f" in {made.seconds:.0f} s: loss {made.first_loss:.2f} -> {made.last_loss:.2f}\n"
        ),
        _heading("2 The spec by which it is loaded"),
        Text(shown.spec),
        _heading("3 The plan"),
        plan(shown.plan),
        _heading("4 The report"),
        report(shown.report),
        _heading("\n5 The adapter, fine-tuned on the Zen of Python"),
        Text(
            f"{tuned.steps} steps in {tuned.seconds:.1f} s:"
            f" loss {tuned.loss_before:.2f} -> {tuned.loss_after:.2f}"
        ),
        _written(tuned),
        Text(
            f"The loss fell, and {tuned.known_by_heart} of {len(tuned.written_after)} lines are"
            " known by heart."
            if tuned.loss_fell
            else "The loss did not fall."
        ),
        Text(f"Model and spec are in {shown.folder}. Next: llmload plan {shown.folder}/demo.yaml"),
    )


def _written(tuned: FineTuning) -> Table:
    table = _table("before", last="after")
    for before, after in zip(tuned.written_before, tuned.written_after, strict=True):
        table.add_row(" ".join(before.split()), " ".join(after.split()))
    return table


def _problems(problems: Iterable[Problem]) -> list[Text]:
    return [
        Text(f"{problem.severity}: {problem}", _COLOURS[problem.severity]) for problem in problems
    ]


def _heading(text: str) -> Text:
    return Text(text, "bold")


def _pairs() -> Table:
    pairs = Table.grid(padding=(0, 2))
    pairs.add_column(style="bold", no_wrap=True)
    pairs.add_column(overflow="fold")
    return pairs


def _table(*names: str, last: str) -> Table:
    """Return a table of which the widest column is folded first, and the first one never."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=name == names[0])
    table.add_column(last, overflow="fold")
    return table


def _trainable(plan: Plan) -> str:
    if plan.trainable_parameters is None:
        return "not known: the load could not be rehearsed"
    share = 100 * plan.trainable / plan.parameters
    return f"{plan.trainable:,} ({share:.2f} %)"


def _made_by(makers: Mapping[str, Any]) -> list[str]:
    """Return one line per maker: how many tensors are new, and the names of a few."""
    counts = Counter(str(maker) for maker in makers.values())
    lines = []
    for maker, count in counts.items():
        names = [name for name, by in makers.items() if str(by) == maker]
        lines.append(f"{count} tensors: {maker}" if count > 3 else f"{', '.join(names)}: {maker}")
    return lines
