"""The hook contract, checked before pluggy sees a plugin: a whole plugin is registered, or none.

pluggy alone lets a misspelt hook pass in silence, never fills in an argument that has a default
(1.6), and keeps calling the earlier hooks of a plugin whose registration failed half-way (1.6).
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import pluggy
from pydantic import BaseModel, PydanticUserError

from llmload import hookspecs
from llmload.context.peers import ABILITIES
from llmload.errors import Conflict
from llmload.host.discovery import GROUP, PluginInfo
from llmload.host.ordering import CircleError, plan_order
from llmload.spec.foreign_keys import Spelling
from llmload.spec.groupspec import ADAPTER_OF, LIKE, MODELS
from llmload.spec.loadspec import LoadSpec
from llmload.spec.renaming import RULES
from llmload.spec.suggest import nearest

_MISSPELT = 0.85
"""How like a known hook the name of an unknown one is at least, where nobody may mean another."""
_PLAIN_REQUIREMENT = re.compile(r"[A-Za-z0-9]+([._-][A-Za-z0-9]+)*((>=|==)\d+(\.\d+)*)?")
"""What nearly every requirement looks like: a name, and a release at most."""


CORE_KEYS = frozenset({*LoadSpec.model_fields, MODELS, LIKE, ADAPTER_OF})
"""Keys of a spec or group that no plugin can own."""


def break_faulty(infos: Iterable[PluginInfo]) -> None:
    """Mark the active plugins that break the contract as broken, with every fault.

    Whether a ``Section`` can be built is left to :func:`break_unbuildable`, since that takes as
    long as all else together, and a load has few of the installed plugins' sections. llmload's own
    plugins are held to the contract by its tests, not again for each registry.
    """
    infos = list(infos)
    break_double_rules(infos)
    active = [info for info in infos if info.status == "active"]
    manager = manager_of(info.plugin for info in active)
    # A plugin that is not imported may declare hooks that others implement.
    complete = len(active) == len(infos)
    builtin = {info.name: info.plugin for info in active if info.builtin}
    for info in active:
        if info.builtin and not info.named:
            continue
        _break(info, partial(faults, info, manager, complete=complete))
        if info.status == "active" and not info.builtin:
            _break(info, partial(order_faults, info, builtin))


def break_double_rules(infos: Iterable[PluginInfo]) -> None:
    """Break the plugins whose key rules are called as those of a plugin before them."""
    owners: dict[str, str] = {}
    for info in sorted(infos, key=lambda info: (not info.builtin, info.name)):
        rules = _rules_of(info) if info.status == "active" else {}
        taken = next((name for name in rules if name in owners), None)
        if taken is not None:
            info.status = "broken"
            info.reason = f"its key rule {taken!r} is also that of {owners[taken]!r}"
        else:
            owners |= dict.fromkeys(rules, info.name)


def _rules_of(info: PluginInfo) -> Mapping[str, object]:
    try:
        rules = getattr(info.plugin, "key_rules", {})
    except Exception:  # a property that raises is found among the faults
        return {}
    return rules if isinstance(rules, Mapping) else {}


def break_unbuildable(infos: Iterable[PluginInfo]) -> None:
    """Mark the active plugins as broken of whose ``Section`` pydantic can make no validator."""
    for info in infos:
        if info.status == "active" and not info.built:
            info.built = True
            _break(info, partial(building_faults, info.plugin))


def _break(info: PluginInfo, look: Callable[[], Iterable[str]]) -> None:
    try:
        found = list(look())
    except Exception as error:  # a property that raises, a metaclass: whatever a stranger made
        found = [f"looking at it raised {type(error).__name__}: {error}"]
        info.plugin = None  # nobody is to look at it again
    if found:
        info.status, info.reason = "broken", "; ".join(found)


def manager_of(plugins: Iterable[object]) -> pluggy.PluginManager:
    """Return a manager that knows all hooks: llmload's, and those that ``plugins`` declare."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    for plugin in plugins:
        # One that declares them wrongly is found among the faults.
        with suppress(Exception):
            manager.add_hookspecs(plugin.Hooks)  # type: ignore[attr-defined]
    return manager


def faults(
    info: PluginInfo, manager: pluggy.PluginManager, *, complete: bool = True
) -> Iterator[str]:
    """Say what is wrong with a plugin before pluggy has seen any of it.

    :param complete: whether the manager knows the hooks of every plugin there is.
    """
    if not info.builtin:
        look_at(info.plugin)
    yield from name_faults(info)
    yield from section_faults(info.plugin)
    yield from declaration_faults(info.plugin)
    yield from hook_faults(info.plugin, manager, complete=complete)


def look_at(plugin: object) -> None:
    """Do what pluggy and the host will do with a plugin, whose faults then come out here."""
    for name in dir(plugin):
        if not name.startswith("__"):
            getattr(plugin, name)
    bool(plugin == object())  # pluggy compares a plugin with those that it has


def name_faults(info: PluginInfo) -> Iterator[str]:
    """Find a name that is not that of the entry point, or not free."""
    name = getattr(info.plugin, "name", None)
    if name != info.name:
        yield f"its entry point is called {info.name!r}, but its `name` is {name!r}"
    if info.name in CORE_KEYS:
        yield f"the name {info.name!r} is a core key of the spec"


def order_faults(info: PluginInfo, others: Mapping[str, object]) -> Iterator[str]:
    """Find an order that cannot hold among other plugins, or that would change theirs."""
    try:
        order = plan_order({**others, info.name: info.plugin})
    except CircleError as error:
        yield f"its `after` and `before` go in a circle: {' -> '.join(error.circle)}"
        return
    if not (getattr(info.plugin, "after", ()) and getattr(info.plugin, "before", ())):
        return  # it moves nobody
    order.remove(info.name)
    for moved, stayed in zip(order, plan_order(others), strict=True):
        if moved != stayed:
            yield f"its `after` and `before` would move {moved!r} before {stayed!r}"
            return


def section_faults(plugin: object) -> Iterator[str]:
    """Find a ``Section`` that no spec could be checked with."""
    section: object = getattr(plugin, "Section", None)
    if section is None:
        return
    if not (inspect.isclass(section) and issubclass(section, BaseModel)):
        yield "its `Section` is not a pydantic model"
    elif section.model_config.get("extra") != "forbid":
        yield 'its `Section` does not forbid unknown keys: set `extra="forbid"`'
    else:
        yield from _spelling_faults(section, str(getattr(plugin, "name", "")))
        needed = [name for name, field in section.model_fields.items() if field.is_required()]
        if needed and getattr(plugin, "always_active", False):
            yield (
                "it is `always_active`, and its `Section` cannot be made without"
                f" {', '.join(map(repr, needed))}: give each a default"
            )


def _spelling_faults(section: type[BaseModel], name: str) -> Iterator[str]:
    """Find foreign spellings that are none, or lead out of the section that carries them."""
    spellings = getattr(section, "spellings", {})
    if not isinstance(spellings, Mapping) or not all(
        isinstance(spelling, Spelling) for spelling in spellings.values()
    ):
        yield "its `Section.spellings` must map keys to llmload.plugin.Spelling"
        return
    for theirs, spelling in spellings.items():
        if spelling.ours and spelling.ours.partition(".")[0] != name:
            yield (
                f"its `Section.spellings` leads from {theirs!r} to {spelling.ours!r}, which is no"
                f" key of {name!r}"
            )


def building_faults(plugin: object) -> Iterator[str]:
    """Find a ``Section`` whose fields pydantic knows no validator for, or that cannot be made."""
    section: type[BaseModel] | None = getattr(plugin, "Section", None)
    if section is not None:
        try:
            section.model_rebuild()  # a subclass of llmload.Section is not built until now
        except PydanticUserError as error:
            yield f"its `Section` cannot be built: {error.message.splitlines()[0]}"
        else:
            if getattr(plugin, "always_active", False):
                section()


def declaration_faults(plugin: object) -> Iterator[str]:
    """Find class attributes that are not of the kind that the host takes them for."""
    for attribute in ("after", "before", "provides", "requires"):
        value = getattr(plugin, attribute, ())
        if isinstance(value, str):
            yield f"its `{attribute}` is the text {value!r}: write `{attribute} = ({value!r},)`"
        elif not _all(value, str):
            yield f"its `{attribute}` is {value!r}, and must be a tuple of texts"
        elif attribute == "requires":
            yield from _requirement_faults(value)
        elif attribute == "provides":
            yield from _ability_faults(value, str(getattr(plugin, "name", "")))
    stage = getattr(plugin, "stage", None)
    if stage is not None and (not isinstance(stage, str) or stage not in hookspecs.STAGES):
        yield _unknown("stage", stage, hookspecs.STAGES)
    yield from _rule_faults(getattr(plugin, "key_rules", {}))
    conflicts = getattr(plugin, "conflicts", ())
    if not _all(conflicts, Conflict):
        yield f"its `conflicts` is {conflicts!r}, and must be a tuple of llmload.Conflict"
        return
    for conflict in conflicts:
        if bool(conflict.key) == bool(conflict.ability):
            yield "one of its `conflicts` must have a `key` or an `ability`, and not both"
        elif conflict.ability:
            yield from _ability_faults((conflict.ability,), "", where="conflicts")


def _rule_faults(rules: object) -> Iterator[str]:
    """Find key rules that are none, or called as one of llmload's own."""
    if not isinstance(rules, Mapping):
        yield f"its `key_rules` is {rules!r}, and must map names to llmload.plugin.KeyRule"
        return
    for name, rule in rules.items():
        if name in RULES:
            yield f"its key rule {name!r} is called as one of llmload's own"
        elif not callable(rule) and not _are_replacements(rule):
            yield (
                f"its key rule {name!r} is neither a function nor a tuple of regular expressions"
                " with their replacements"
            )


def _are_replacements(rule: Any) -> bool:
    try:
        for pattern, replacement in rule:
            re.sub(pattern, replacement, "")
    except (TypeError, ValueError, re.error, IndexError):
        return False
    return True


def _ability_faults(words: Iterable[str], name: str, *, where: str = "provides") -> Iterator[str]:
    for word in words:
        if word not in ABILITIES and not (word.startswith(f"{name}.") if name else "." in word):
            own = f"One of its own begins with '{name}.'"
            yield f"{_unknown(where, word, ABILITIES)} {own}"


def _unknown(attribute: str, word: object, known: Iterable[str]) -> str:
    """Say that a word is none of those that are known, and which was meant."""
    meant = nearest(str(word), known) or f"Known are: {', '.join(known)}."
    return f"its `{attribute}` {word!r} is not known. {meant}"


def _all(value: object, kind: type) -> bool:
    """Whether a value is a collection of instances of ``kind``, which can be gone through again."""
    return isinstance(value, Collection) and all(isinstance(item, kind) for item in value)


def _requirement_faults(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if _PLAIN_REQUIREMENT.fullmatch(text):
            continue  # importing what parses all others takes longer than the rest of the contract
        from packaging.requirements import InvalidRequirement, Requirement

        try:
            Requirement(text)
        except InvalidRequirement as error:
            reason = str(error).splitlines()[0]
            yield f"its `requires` has {text!r}, which names no distribution: {reason}"


def hook_faults(
    plugin: object, manager: pluggy.PluginManager, *, complete: bool = True
) -> Iterator[str]:
    """Find hooks that pluggy would take in silence and call never, or otherwise than is meant."""
    declared: Any = getattr(plugin, "Hooks", None)
    if declared is not None and not any(
        manager.parse_hookspec_opts(declared, name) is not None for name in dir(declared)
    ):
        yield "its `Hooks` declares no hook: mark each with @llmload.hookspec"
    specs = {n: vars(manager.hook)[n] for n in vars(manager.hook) if not n.startswith("_")}
    for attribute in dir(plugin):
        if attribute.startswith("__"):  # no hook is, and looking at each takes a while
            continue
        options = manager.parse_hookimpl_opts(plugin, attribute)
        if options is None:
            if attribute in specs and inspect.isfunction(inspect.getattr_static(plugin, attribute)):
                yield f"`{attribute}` is not marked with @llmload.hookimpl"
            continue
        hook = options["specname"] or attribute
        if hook not in specs and (
            options["optionalhook"]
            or not (complete or difflib.get_close_matches(hook, specs, n=1, cutoff=_MISSPELT))
        ):
            continue  # the plugin that declares it is not here
        if hook not in specs:
            yield f"`{hook}` is not a hook. {nearest(hook, specs)}".strip()
            continue
        if options["tryfirst"] or options["trylast"]:
            yield f"`{hook}` uses tryfirst or trylast: order is set with `after` and `before`"
        yield from _argument_faults(hook, getattr(plugin, attribute), specs[hook].spec.argnames)


def _argument_faults(hook: str, method: Any, allowed: tuple[str, ...]) -> Iterable[str]:
    bound = inspect.ismethod(method)
    for name, has_default in _parameters(method.__func__ if bound else method, bound=bound):
        if name not in allowed:
            yield f"`{hook}` takes the argument {name!r}, the hook offers {', '.join(allowed)}"
        elif has_default:
            # pluggy 1.6 never fills in an argument that has a default.
            yield f"`{hook}` gives the argument {name!r} a default, which would hide it"


@lru_cache(maxsize=1024)  # the same plugins are looked at for each registry
def _parameters(function: Callable[..., Any], *, bound: bool) -> tuple[tuple[str, bool], ...]:
    """Return the name of each parameter and whether it has a default; of a method without self."""
    parameters = list(inspect.signature(function).parameters.values())
    if bound and parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
        del parameters[0]
    return tuple((each.name, each.default is not each.empty) for each in parameters)
