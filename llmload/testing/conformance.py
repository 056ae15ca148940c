"""The conformance suite: holds a plugin to the contract, and says of each fault what to do.

What can be seen without calling a hook is looked at here; what takes a load is tried in processes
of its own (:mod:`llmload.testing.trials`), so that a plugin which exits, prints, hangs or leaves
something behind does no harm to the tests that ask.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ValidationError

import llmload
from llmload.host import ordering
from llmload.host.contract import (
    building_faults,
    declaration_faults,
    hook_faults,
    manager_of,
    name_faults,
    order_faults,
    section_faults,
)
from llmload.host.discovery import PluginInfo
from llmload.plugin import nearest
from llmload.testing import examples, ranks, trials

RULES: Final[Mapping[str, str]] = {
    "name": "It has a name of lower-case letters, digits and underscores, and of no core key.",
    "name-is-free": "No other installed plugin has its name.",
    "hooks": "Its hooks are spelt rightly, marked, and take only what is offered.",
    "declarations": "Its class attributes are spelt rightly and of the right kind.",
    "section": "Its section can be built and forbids unknown keys.",
    "section-schema": "Its section has a JSON schema in which every key is described.",
    "order": "What it says of its order holds among all installed plugins.",
    "light-import": "Importing it imports no machine-learning library: every command does so.",
    "example": "There is a spec in which it takes part and that can be planned.",
    "rehearsal": "Its hooks run on the meta device, and the plan reads no weight.",
    "load": "The spec that could be planned loads, and the audit finds nothing.",
    "plan-equals-load": "What the plan foretells of the model is what is loaded.",
    "eval-mode": "It leaves the model in eval mode.",
    "report": "What it adds to plan and report can be written as JSON.",
    "repeatable": "A second load with the same registry gives the same plan and model.",
    "silence": "It writes nothing to standard output, which belongs to data.",
    "nothing-left-behind": "No global state is other than before, whether a load ends well or not.",
    "failures": "Where another hook fails or Ctrl-C comes, that is told, and the next load works.",
    "lasting": "It uses nothing that a coming release lacks.",
    "bad-sections": "A section it cannot work with is refused, in words, before a weight is read.",
    "two-ranks": "Two ranks make the same plan and the same model.",
}
"""Rule -> what it holds a plugin to."""

HEAVY: Final = ("torch", "transformers", "numpy", "peft", "deepspeed", "bitsandbytes", "accelerate")

_DECLARATIONS: Final = (
    "Hooks",
    "Section",
    "after",
    "always_active",
    "before",
    "conflicts",
    "audits_rehearsal",
    "name",
    "provides",
    "rehearsed",
    "requires",
    "stage",
)


@dataclass(frozen=True)
class Finding:
    """One way in which a plugin breaks the contract."""

    rule: str
    """A key of :data:`RULES`."""
    message: str
    """What was found, in one sentence without a final full stop."""
    fix: str
    """What to do about it, in one imperative sentence."""

    def __str__(self) -> str:
        stop = "" if self.message.endswith("?") else "."
        return f"[{self.rule}] {self.message}{stop} {self.fix}"


def assert_plugin(
    plugin: object,
    *,
    spec: Mapping[str, Any] | None = None,
    bad: Sequence[Mapping[str, Any]] = (),
    folder: Path | None = None,
    leaves: Collection[str] = (),
    skip: Collection[str] = (),
    timeout: float = 120.0,
) -> None:
    """Hold a plugin to the contract. Arguments are those of :func:`findings`.

    :raises AssertionError: it breaks the contract; the message names every rule that it breaks, and
        what to do.
    """
    found = findings(
        plugin, spec=spec, bad=bad, folder=folder, leaves=leaves, skip=skip, timeout=timeout
    )
    if found:
        name = getattr(plugin, "name", plugin)
        told = "\n".join(f"- {finding}" for finding in found)
        raise AssertionError(f"plugin {name!r} breaks the contract in {len(found)} ways:\n{told}")


def findings(
    plugin: object,
    *,
    spec: Mapping[str, Any] | None = None,
    bad: Sequence[Mapping[str, Any]] = (),
    folder: Path | None = None,
    leaves: Collection[str] = (),
    skip: Collection[str] = (),
    timeout: float = 120.0,
) -> list[Finding]:
    """Return every way in which a plugin breaks the contract; none for a sound one.

    It is loaded about twenty times, in processes of their own, which takes some seconds. Whoever
    wants to debug a finding repeats the load in the test itself.

    :param plugin: the class, or an object.
    :param spec: in which it takes part, without ``model``: other keys and its own section. Without
        it, the section's defaults, ``examples`` and types make one up.
    :param bad: sections of its own that must be refused. Wrong types, unknown keys and the like are
        tried in any case.
    :param folder: of the model to load; without it a tiny Llama with a tokenizer is made.
    :param leaves: keys of :func:`~llmload.testing.snapshot` that it changes for good, on purpose.
    :param skip: rules that are not looked at; see :data:`RULES`.
    :param timeout: seconds for each part of the trials.
    :raises ValueError: ``skip`` names no rule.
    """
    for rule in skip:
        if rule not in RULES:
            raise ValueError(f"{rule!r} is not a rule. {nearest(rule, RULES)}".strip())
    found = list(_of_declarations(plugin))
    # What is broken takes part in no load.
    if not found:
        with tempfile.TemporaryDirectory() as place:
            model = folder or trials.make_folder(Path(place), timeout)
            found = list(_of_trials(plugin, spec, bad, model, leaves, timeout))
    return [finding for finding in found if finding.rule not in skip]


# --- without a load ---------------------------------------------------------------------------


def _of_declarations(plugin: object) -> Iterator[Finding]:
    kind = plugin if inspect.isclass(plugin) else type(plugin)
    try:
        made = plugin() if inspect.isclass(plugin) else plugin
    except Exception as error:
        yield Finding(
            "declarations",
            f"it cannot be made: {type(error).__name__}: {error}",
            "Let the class take no arguments; the host makes it with none.",
        )
        return
    yield from _of_name(made)
    if not isinstance(getattr(made, "name", None), str):
        return
    for text in hook_faults(made, manager_of([*_others(made), made])):
        yield Finding("hooks", text, "See llmload.hookspecs for every hook and its arguments.")
    faults = list(section_faults(made)) or list(building_faults(made))
    for text in faults:
        yield Finding("section", text, "Let `Section` be a subclass of llmload.Section.")
    wrong = list(declaration_faults(made))
    for text in wrong:
        yield Finding("declarations", text, "See the head of llmload.hookspecs for each attribute.")
    yield from _of_spelling(made)
    if not faults:
        yield from _of_schema(made)
    if not wrong:
        yield from _of_order(made)
    yield from _of_import(kind)


def _of_name(plugin: Any) -> Iterator[Finding]:
    name = getattr(plugin, "name", None)
    if not isinstance(name, str) or not name.isidentifier() or name != name.lower():
        yield Finding(
            "name",
            f"its `name` is {name!r}",
            "Give it a class attribute `name` of lower-case letters, digits and underscores.",
        )
        return
    for text in name_faults(PluginInfo(name, "", builtin=False, status="active", plugin=plugin)):
        yield Finding("name", text, "Choose another name.")
    others = [
        info
        for info in llmload.create_registry(environ={}).plugins
        if info.name == name and type(info.plugin) is not type(plugin)
    ]
    for info in others:
        yield Finding(
            "name-is-free",
            f"{info.distribution} has a plugin {name!r}",
            "Choose another name; a plugin cannot replace another.",
        )


def _others(plugin: Any) -> list[Any]:
    """Return the plugins that work here, but for this one."""
    registry = llmload.create_registry(environ={})
    return [
        info.plugin
        for info in registry.plugins
        if info.status == "active" and info.name != getattr(plugin, "name", None)
    ]


def _of_spelling(plugin: Any) -> Iterator[Finding]:
    for attribute in vars(type(plugin)) | getattr(plugin, "__dict__", {}):
        if attribute.startswith("_") or attribute in _DECLARATIONS:
            continue
        value = inspect.getattr_static(plugin, attribute)
        meant = nearest(attribute, _DECLARATIONS)
        if meant and not inspect.isroutine(value):
            yield Finding(
                "declarations",
                f"`{attribute}` is no attribute that the host reads. {meant}",
                "Spell it so, or choose a name that is less alike.",
            )
    for attribute in ("always_active", "audits_rehearsal", "rehearsed"):
        value = getattr(plugin, attribute, False)
        if not isinstance(value, bool):
            yield Finding(
                "declarations",
                f"its `{attribute}` is {value!r}",
                f"Write `{attribute} = True` or `{attribute} = False`.",
            )
    keys = {*llmload.LoadSpec.model_fields, *(other.name for other in _others(plugin))}
    for conflict in getattr(plugin, "conflicts", ()):
        key = conflict.key if isinstance(conflict, llmload.Conflict) else ""
        meant = nearest(key, keys) if key else ""
        if meant and key not in keys:
            yield Finding(
                "declarations",
                f"one of its `conflicts` is with {key!r}, which is no key. {meant}",
                "Name a core key of the spec, or a plugin.",
            )


def _of_schema(plugin: Any) -> Iterator[Finding]:
    section: type[BaseModel] | None = getattr(plugin, "Section", None)
    if section is None:
        return
    try:
        schema = section.model_json_schema()
    except Exception as error:
        yield Finding(
            "section-schema",
            f"its section has no JSON schema: {str(error).splitlines()[0]}",
            "Use types of JSON in the section, or give the field a schema of its own.",
        )
        return
    described = {"": schema} | schema.get("$defs", {})
    for name, part in described.items():
        kind = f"`{name}`" if name else "the section"
        if name == "" and not _is_described(part, section):
            yield Finding(
                "section-schema",
                f"{kind} {section.__name__} has no docstring",
                "Say in one sentence what the section is for.",
            )
        for key, value in part.get("properties", {}).items():
            if not value.get("description"):
                where = f"{name}.{key}" if name else key
                yield Finding(
                    "section-schema",
                    f"the key {where!r} has no description",
                    "Write a docstring under the field, or `Field(description=...)`.",
                )


def _is_described(schema: Mapping[str, Any], section: type[BaseModel]) -> bool:
    inherited = {inspect.cleandoc(base.__doc__ or "") for base in (BaseModel, llmload.Section)}
    return bool(schema.get("description")) and schema["description"] not in inherited


def _of_order(plugin: Any) -> Iterator[Finding]:
    name = plugin.name
    known = {other.name for other in _others(plugin)}
    for attribute in ("after", "before"):
        for other in getattr(plugin, attribute, ()):
            meant = nearest(other, known)
            if other == name:
                yield Finding("order", f"its `{attribute}` names itself", "Remove the name.")
            elif other not in {*known, ordering.LAST} and meant:
                yield Finding(
                    "order",
                    f"its `{attribute}` names {other!r}, which is not installed. {meant}",
                    "Spell the name as that plugin does; a name of nobody is ignored.",
                )
            elif other == ordering.LAST and attribute == "before":
                yield Finding(
                    "order", "its `before` has '*'", "Only `after` takes it: after all others."
                )
    others = {other.name: other for other in _others(plugin)}
    info = PluginInfo(name, "", builtin=False, status="active", plugin=plugin)
    for text in order_faults(info, others):
        yield Finding("order", text, "Take one of the wishes back.")


def _of_import(kind: type) -> Iterator[Finding]:
    """Import the plugin's module in a new process, as every command does."""
    if "<locals>" in kind.__qualname__ or kind.__module__ == "__main__":
        return
    code = (
        "import sys, importlib, json, warnings\n"
        f"sys.path[:] = {sys.path!r}\n"
        "import llmload.host.registry\n"
        "from llmload.leaving import LeavingWarning\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always', LeavingWarning)\n"
        f"    importlib.import_module({kind.__module__!r})\n"
        "goes = [str(one.message) for one in told if one.category is LeavingWarning]\n"
        f"heavy = sorted(set({HEAVY!r}) & set(sys.modules))\n"
        "print(json.dumps([heavy, goes]))\n"
    )
    module = sys.modules.get(kind.__module__)
    imported = set(HEAVY) & {n for n, v in vars(module).items() if inspect.ismodule(v)}
    if _is_test(kind) and not imported:
        return  # a module of tests imports what tests need; no entry point leads there
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    heavy, goes = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else ([], [])
    for text in dict.fromkeys(goes):
        yield Finding("lasting", *trials.of_leaving(text))
    if done.returncode != 0:
        yield Finding(
            "light-import",
            f"its module {kind.__module__!r} cannot be imported in a new process:"
            f" {(done.stderr.strip() or 'it exits').splitlines()[-1]}",
            "Let the module be imported by its name alone.",
        )
    elif heavy:
        yield Finding(
            "light-import",
            f"importing {kind.__module__!r} imports {', '.join(heavy)}",
            "Import it in the functions that need it: every command imports every plugin.",
        )


def _is_test(kind: type) -> bool:
    last = kind.__module__.rpartition(".")[2]
    return last.startswith("test_") or last.endswith("_test") or last == "conftest"


# --- with loads -------------------------------------------------------------------------------


def _of_trials(
    plugin: object,
    spec: Mapping[str, Any] | None,
    bad: Sequence[Mapping[str, Any]],
    folder: Path,
    leaves: Collection[str],
    timeout: float,
) -> Iterator[Finding]:
    made: Any = plugin() if inspect.isclass(plugin) else plugin
    section: type[BaseModel] | None = getattr(made, "Section", None)
    wanted = {"model": str(folder), **(spec or {})}
    if section is not None and made.name not in wanted:
        try:
            wanted[made.name] = examples.section_of(section)
        except ValidationError as error:
            yield Finding(
                "example",
                "no section could be made up from its types:"
                f" {error.errors()[0]['msg']} ({'.'.join(map(str, error.errors()[0]['loc']))})",
                "Give `spec=`, or each required field an example: `Field(examples=[...])`.",
            )
            return
    tried = trials.Case(plugin, wanted, tuple(leaves), tuple(dict(one) for one in bad))
    modules: list[str] = []
    for part in (trials.once, trials.in_bad_order, trials.afterwards):
        arguments = (tried, modules) if part is trials.afterwards else (tried,)
        (ended,) = ranks.outcomes(part, arguments, ranks=1, timeout=timeout, process_group=False)
        if ended.error:
            yield Finding(
                "failures" if part is trials.afterwards else "load",
                f"the trial of its hooks did not come to its end: {_last(ended.error)}",
                "A hook must neither exit nor hang; raise, or return.",
            )
            return
        told, seen = ended.value
        yield from (Finding(*one) for one in told)
        if part is trials.once:
            if seen is None:
                return  # it does not load at all
            modules = seen
    yield from _of_ranks(tried, timeout)


def _of_ranks(tried: trials.Case, timeout: float) -> Iterator[Finding]:
    both = ranks.outcomes(trials.on_a_rank, (tried,), ranks=2, timeout=timeout, process_group=True)
    failed = [(rank, ended.error) for rank, ended in enumerate(both) if ended.error]
    for rank, error in failed[:1]:
        yield Finding(
            "two-ranks",
            f"rank {rank} of 2 fails where one process does not: {_last(error)}",
            "Wait for no rank that may not come, and ask torch.distributed which one this is.",
        )
    if not failed:
        for what in trials.disagreements(both[0].value, both[1].value):
            yield Finding(
                "two-ranks",
                f"the ranks disagree on {what}",
                "Let every rank decide from what all ranks have: the spec, the files, one seed.",
            )


def _last(error: str) -> str:
    return error.strip().splitlines()[-1]
