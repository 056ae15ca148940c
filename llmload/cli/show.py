"""Plan, report and lists for people, made with rich: a choice of what the JSON has in full."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmload.loading import printed
from llmload.spec.wording import pattern, size_text

if TYPE_CHECKING:
    from llmload.cli.demo import Demonstration, FineTuning
    from llmload.cli.doctor import Diagnoses
    from llmload.cli.environment import Environment, HookList, PluginList
    from llmload.cli.explaining import Explanation
    from llmload.cli.inspecting import Inspection, StoredTensor, Targets
    from llmload.cli.keeping import Kept
    from llmload.group.loading import GroupReport
    from llmload.group.planning import GroupPlan
    from llmload.group.sharing import Sharing
    from llmload.host.compatibility import Compatibility
    from llmload.saving.save import Saved

_SHARED = {
    "checkpoint pages": "{member} and {of} lie on the checkpoint's own pages",
    "one cast": "{member} takes what was cast for {of}",
    "adapter off": "{member} is {of} with its adapter off",
    "frozen copy": "{member} is {of} with a frozen copy of its adapter",
}
_COLOURS = {
    **dict.fromkeys(("broken", "does not work"), "red"),
    "works in part": "yellow",
    **dict.fromkeys(("active", "works"), "green"),
}


def saved(written: Saved) -> RenderableType:
    """Render which files were written."""
    facts = printed.pairs()
    facts.add_row(written.kind, f"{written.folder}, {size_text(written.size)}")
    for file in written.files:
        facts.add_row("file", f"{file.name}, {size_text(file.size)}")
    return facts


def kept(found: Kept) -> RenderableType:
    """Render what is kept, or was removed."""
    total = f"{len(found.folders)} in {found.place}, {size_text(found.size)}"
    summary = Text(f"removed: {total}" if found.removed else total)
    if not found.folders:
        return summary
    table = printed.table("key", "size", "last used", last="what")
    for each in found.folders:
        used = datetime.fromtimestamp(each.used, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        table.add_row(each.key, size_text(each.size), used, each.about)
    return Group(table, summary)


def compatibility(found: Compatibility) -> RenderableType:
    """Render what does not go together, then what works in part on a stack."""
    pairs = printed.table("section", "with", "works", last="because")
    for pair in found.pairs:
        pairs.add_row(pair.one, pair.other, pair.works, pair.reason)
    stacks = printed.table("section", "stack", "works", last="")
    for each in found.stacks:
        if each.works != "yes":
            stacks.add_row(each.section, each.stack, each.works, each.reason)
    told = [each for each in (pairs, stacks) if each.row_count]
    rest = "All other pairs go together." if told else "Nothing stands against them."
    return Group(*told, rest)


def inspection(found: Inspection, *, every: bool) -> RenderableType:
    """Render what lies in the folder of a model, names that differ in their numbers once."""
    facts = printed.pairs()
    facts.add_row("model", found.model)
    facts.add_row("folder", found.folder)
    for key, value in found.config.items():
        facts.add_row(key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    for name, size in found.files.items():
        here = ", not here yet" if name in found.to_fetch else ""
        facts.add_row("file", f"{name}, {size_text(size)}{here}")
    for dtype, (elements, nbytes) in found.by_dtype().items():
        facts.add_row("weights", f"{elements:,} of {dtype}, {size_text(nbytes)}")
    table = printed.table("dtype", "shape", "size", last="tensors")
    groups: dict[tuple[str, str, tuple[int, ...]], list[StoredTensor]] = {}
    for tensor in found.tensors:
        name = tensor.name if every else pattern(tensor.name)
        groups.setdefault((name, tensor.dtype, tensor.shape), []).append(tensor)
    for (name, dtype, shape), members in groups.items():
        together = size_text(sum(tensor.nbytes for tensor in members))
        table.add_row(dtype, _shape(shape), together, _named(name, len(members)))
    return Group(facts, table)


def targets(found: Targets) -> RenderableType:
    """Render the modules that an adapter could go on."""
    table = printed.table("class", "weight", "size", "lora", last="modules")
    for modules in found.modules:
        shapes = modules.shapes.get("weight") or next(iter(modules.shapes.values()))
        count = len(modules.names)
        taken = f"{modules.adapted} of {count}" if modules.adapted else ""
        table.add_row(
            modules.kind,
            " or ".join(map(_shape, shapes)),
            size_text(modules.nbytes),
            taken,
            _named(modules.pattern, count),
        )
    return Group(_heading(found.model_class), table)


def _named(name: str, count: int) -> printed.Name:
    return printed.Name(f"{name} ({count})" if count > 1 else name)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one value"


def group_plan(plans: GroupPlan) -> RenderableType:
    """Render what a load of several models will do."""
    members = [
        part
        for name, made in plans.members.items()
        for part in (_heading(name), printed.plan(made.model_copy(update={"problems": []})))
    ]
    facts = _shared(plans.shared)
    for name, reason in plans.apart.items():
        facts.add_row("not shared", f"{name}: {reason}")
    memory = [printed.memory(plans.memory)] if plans.memory else []
    return Group(*members, _heading("together"), facts, *memory, *printed.problems(plans.problems))


def group_report(reports: GroupReport) -> RenderableType:
    """Render what a load of several models did."""
    members = [
        part
        for name, made in reports.members.items()
        for part in (_heading(name), printed.report(made))
    ]
    return Group(*members, _heading("together"), _shared(reports.shared))


def _shared(shared: Iterable[Sharing]) -> Table:
    facts = printed.pairs()
    for found in shared:
        what = _SHARED[found.how].format(member=found.member, of=found.of)
        until = "" if found.lasting else ", until a training step writes them"
        facts.add_row("shared", f"{what}: {size_text(found.saved_bytes)} saved{until}")
    return facts


def plugins(listed: PluginList) -> RenderableType:
    """Render the plugins as a table, the active ones in plan order."""
    table = printed.table("plugin", "key", "status", last="what it does, or what is wrong")
    for entry in listed.plugins:
        told = entry.reason or _prose(entry.does) or ", ".join(entry.hooks)
        ours = entry.distribution.partition(" ")[0] == "llmload"
        table.add_row(
            entry.name,
            "yes" if entry.section else "",
            Text(entry.status, _COLOURS.get(entry.status, "")),
            Text(told if ours else f"{told} [{entry.distribution}]"),
        )
    return Group(table, *printed.problems(listed.problems))


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
    versions = printed.pairs()
    for name, version in found.versions.items():
        versions.add_row(name, version)
    table = printed.table("plugin", "here", last="what works, and how to get the rest")
    for diagnosis in found.plugins:
        lines = [*diagnosis.works, *map(str, diagnosis.problems)]
        health = Text(diagnosis.health, _COLOURS.get(diagnosis.health, ""))
        table.add_row(diagnosis.name, health, Text("\n".join(lines)))
    return Group(versions, table, *printed.problems(found.problems))


def explanation(found: Explanation) -> RenderableType:
    """Render what a key means, and the keys in it."""
    facts = printed.pairs()
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
        table = printed.table("key", "default", last="what it takes, and what it does")
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
        printed.plan(shown.plan),
        _heading("4 The report"),
        printed.report(shown.report),
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
    table = printed.table("before", last="after")
    for before, after in zip(tuned.written_before, tuned.written_after, strict=True):
        table.add_row(" ".join(before.split()), " ".join(after.split()))
    return table


def _heading(text: str) -> Text:
    return Text(text, "bold")
