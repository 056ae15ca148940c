"""Plan and report as people read them in a terminal: a choice of what the JSON has in full.

Both print themselves by it, so that here their types are not known.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from llmload.context.forecast import PHASES
from llmload.errors import visible
from llmload.spec.wording import alike, size_text

if TYPE_CHECKING:
    from llmload.errors import Problem
    from llmload.loading.memory import Memory, PhasePeak

_WIDTH = 100
_LEAST = 1000
"""What takes less than this part of the largest is not shown."""

_COLOURS = {"error": "red", "warning": "yellow"}


class Visible:
    """Renders something with every control character in it shown as an escape."""

    def __init__(self, rendered: RenderableType) -> None:
        self._rendered = rendered

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._rendered, options):
            yield Segment(visible(segment.text), segment.style, segment.control)


class Name:
    """A dotted name that is broken behind a dot or space where it does not fit, and not in a word.

    :param name: with whatever stands behind it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._parts = re.findall(r"[^. ]*[. ]?", name)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        lines = [""]
        for part in self._parts:
            if lines[-1] and len(lines[-1]) + len(part.rstrip()) > options.max_width:
                lines.append("")
            lines[-1] += part
        yield Text("\n".join(lines), overflow="fold")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(max(map(len, self._parts)), len(self._name))


def text(rendered: RenderableType) -> str:
    """Return what is rendered as plain text, for ``str`` and ``print``."""
    console = Console(width=_WIDTH, no_color=True, force_terminal=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(Visible(rendered))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def plan(plan: Any) -> RenderableType:
    """Render what a load will do."""
    facts = pairs()
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
    for place, modules in _by_place(plan.device_map).items():
        facts.add_row(f"on {place}", ", ".join(modules))
    if plan.parameters:
        facts.add_row("parameters", f"{plan.parameters:,}, {size_text(plan.parameter_bytes)}")
        facts.add_row("trainable", _trainable(plan))
    for shown in plan.lines:
        facts.add_row(shown.label, shown.text)
    for name in made_by(plan.new_parameters):
        facts.add_row("new", name)
    taken: list[RenderableType] = []
    if plan.memory is not None:
        taken = [memory(plan.memory.phases), _items(plan.memory)]

    steps = table("step", "plugin", last="what it does")
    for step in plan.steps:
        steps.add_row(step.hook, step.plugin, Text("\n".join(step.notes)))
    return Group(facts, *([steps] if plan.steps else ()), *taken, *problems(plan.problems))


def memory(phases: Iterable[PhasePeak]) -> Table:
    """Render the peaks of one process, a phase a row."""
    peaks = table("memory", "host", "pages of files", "accelerator", last="when")
    for peak in phases:
        sizes = (size_text(n) if n else "" for n in (peak.host, peak.pages, peak.device))
        peaks.add_row(peak.phase, *sizes, PHASES[peak.phase])
    return peaks


def _items(memory: Memory) -> Table:
    """Render what the peaks are made of, what is least not at all."""
    items = table("takes", "where", "size", last="what")
    most = max((item.nbytes for item in memory.items), default=0)
    for item in memory.items:
        if item.nbytes * _LEAST >= most:
            since = f"from {item.phase} on" if item.lasting else f"during {item.phase}"
            by = f"{item.plugin}: " if item.plugin else ""
            items.add_row(since, item.place, size_text(item.nbytes), f"{by}{item.what}")
    return items


def report(report: Any) -> RenderableType:
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

    facts = pairs()
    for label, said in (("model", report.model), ("folder", report.folder)):
        if said:
            facts.add_row(label, said)
    if report.commit:
        facts.add_row("commit", report.commit)
    if report.loader:
        facts.add_row("loader", report.loader)
    for name, reason in report.declined.items():
        facts.add_row("declined", f"{name}: {reason}")
    facts.add_row("parameters", f"{report.parameters:,}, {size_text(report.parameter_bytes)}")
    for where, text in _beside(report):
        facts.add_row(where, text)
    for name in made_by(report.newly_initialised):
        facts.add_row("new", name)
    for shown in report.lines:
        facts.add_row(shown.label, shown.text)
    for name in made_by(report.left_out):
        facts.add_row("left out", name)
    for line in report.audit:
        facts.add_row("proved", line)
    return Group(phases, facts, Text(report.trainable_line()))


def _beside(report: Any) -> Iterator[tuple[str, str]]:
    """Yield what was foretold beside what was measured."""
    for where, found in report.foretold_and_measured().items():
        most = "" if found.rose else "at most "
        yield (
            f"{where} memory",
            f"{size_text(found.foretold)} foretold, {most}{size_text(found.measured)} measured",
        )


def problems(problems: Iterable[Problem]) -> list[Text]:
    """Render errors and warnings, a paragraph each."""
    return [
        Text(f"{problem.severity}: {problem}", _COLOURS[problem.severity]) for problem in problems
    ]


def pairs() -> Table:
    """Return a table of labels and what they say."""
    pairs = Table.grid(padding=(0, 2))
    pairs.add_column(style="bold", no_wrap=True)
    pairs.add_column(overflow="fold")
    return pairs


def table(*names: str, last: str) -> Table:
    """Return a table of which the widest column is folded first, and the first one never."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=name == names[0])
    table.add_column(last, overflow="fold")
    return table


def _by_place(device_map: Mapping[str, int | str]) -> dict[int | str, list[str]]:
    """Return what is on each device, names that differ in their numbers once."""
    found: dict[int | str, list[str]] = {}
    for name, place in device_map.items():
        found.setdefault(place, []).append(name or "the whole model")
    return {place: alike(names) for place, names in found.items()}


def _trainable(plan: Any) -> str:
    if plan.trainable_parameters is None:
        return "not known: the load could not be rehearsed"
    share = 100 * plan.trainable / plan.parameters
    return f"{plan.trainable:,} ({share:.2f} %)"


def made_by(makers: Mapping[str, Any]) -> list[str]:
    """Return one line per maker: how many tensors are new, and the names of a few."""
    counts = Counter(str(maker) for maker in makers.values())
    lines = []
    for maker, count in counts.items():
        names = [name for name, by in makers.items() if str(by) == maker]
        lines.append(f"{count} tensors: {maker}" if count > 3 else f"{', '.join(names)}: {maker}")
    return lines
