"""The host: finds plugins, refuses the broken ones by name, and calls the others in one order.

``create_registry`` looks at the installed distributions and makes a :class:`Registry`;
``Registry.activate`` picks the plugins that take part in one load and returns its :class:`Host`.
pluggy does the calling. What this module adds are the guards around its traps: a fixed order instead
of last-registered-first, a whole plugin or none of it, no silent misspelling, no defaulted argument,
no ``None`` taken for "pass".
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal

import pluggy
from pydantic import BaseModel

from . import hookspecs, ordering, specfile
from .errors import PluginError, Problem, RequestError
from .spec import LoadSpec, validate
from .suggest import nearest

GROUP = "llmload"
PLUGINS_VARIABLE = "LLMLOAD_PLUGINS"
DISABLE_AUTOLOAD_VARIABLE = "LLMLOAD_DISABLE_PLUGIN_AUTOLOAD"

Status = Literal["active", "blocked", "not selected", "broken"]


@dataclass
class PluginInfo:
    """What is known of one plugin, imported or not."""

    name: str
    distribution: str
    """Distribution and version (``llmload 0.1.0``), or where a plugin object came from."""
    builtin: bool
    status: Status
    reason: str = ""
    """Why it is broken; empty otherwise."""
    named: bool = False
    """Whether an argument, ``-p`` or the environment asked for it by name."""
    plugin: Any = field(default=None, repr=False)

    @property
    def section(self) -> type[BaseModel] | None:
        """The pydantic model of its spec key, if it has one."""
        return getattr(self.plugin, "Section", None)

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of the hooks it implements, in the manual's order."""
        return tuple(
            name
            for name in (*hookspecs.HELPERS, *hookspecs.SPINE)
            if callable(getattr(self.plugin, name, None))
        )


class _Manager(pluggy.PluginManager):
    """A plugin manager that can call one plugin's implementation of a hook."""

    def call_one(self, plugin: object, hook: str, **kwargs: Any) -> Any:
        """Call ``hook`` of ``plugin`` through pluggy; returns its result, None included."""
        others = [
            impl.plugin
            for impl in getattr(self.hook, hook).get_hookimpls()
            if impl.plugin is not plugin and not impl.wrapper
        ]
        results = self.subset_hook_caller(hook, others)(**kwargs)
        return results[0] if results else None


class Host:
    """The plugins of one load, in plan order. Made by :meth:`Registry.activate`."""

    def __init__(
        self, spec: LoadSpec, infos: list[PluginInfo], sections: Mapping[str, BaseModel]
    ) -> None:
        self.spec = spec
        self.infos = infos
        self.sections = sections
        self._by_name = {info.name: info for info in infos}
        self._manager = _Manager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        for info in infos:
            if hasattr(info.plugin, "Hooks"):
                self._manager.add_hookspecs(info.plugin.Hooks)
        # pluggy calls the last registered first: registered backwards, plan order is call order.
        for info in reversed(infos):
            self._manager.register(info.plugin, name=info.name)
        self._manager.check_pending()
        self.hook = self._manager.hook

    @property
    def names(self) -> tuple[str, ...]:
        """The active plugins in plan order."""
        return tuple(info.name for info in self.infos)

    def implementing(self, hook: str) -> list[str]:
        """Names of the active plugins that implement ``hook``, in plan order."""
        found = {
            impl.plugin_name
            for impl in getattr(self.hook, hook).get_hookimpls()
            if not impl.wrapper
        }
        return [name for name in self.names if name in found]

    def call(self, name: str, hook: str, **kwargs: Any) -> Any:
        """Call one plugin's ``hook``. Errors of the request get the plugin's name."""
        info = self._by_name[name]
        try:
            return self._manager.call_one(info.plugin, hook, **kwargs)
        except RequestError as error:
            error.problems = tuple(
                problem if problem.plugin else problem.model_copy(update={"plugin": name})
                for problem in error.problems
            )
            raise

    def describe(self, name: str) -> str:
        """Return ``'name' (distribution version)`` for messages."""
        return f"{name!r} ({self._by_name[name].distribution})"


class Registry:
    """All plugins that are known here: selected, blocked, broken, or not asked for."""

    def __init__(self, infos: Iterable[PluginInfo]) -> None:
        self.plugins: tuple[PluginInfo, ...] = tuple(sorted(infos, key=lambda info: info.name))

    @property
    def sections(self) -> dict[str, type[BaseModel]]:
        """The spec keys that plugins own, with their pydantic models."""
        return {
            info.name: info.section
            for info in self.plugins
            if info.status == "active" and info.section is not None
        }

    def validate(self, source: specfile.Source) -> LoadSpec:
        """Read a spec and check it, sections included.

        :raises SpecError: with every fault at once.
        :raises PluginError: a key of the spec belongs to a broken or blocked plugin.
        """
        document = specfile.read(source)
        self._refuse_unusable(document.data)
        return validate(document, self.sections)

    def activate(self, spec: LoadSpec) -> Host:
        """Return the plugins that take part in a load of ``spec``, ordered and ready to be called.

        :raises PluginError: the load names a plugin that is broken, or the order has a cycle.
        """
        self._refuse_unusable(spec.sections)
        taking_part: dict[str, PluginInfo] = {}
        sections: dict[str, BaseModel] = {}
        for info in self.plugins:
            if info.status != "active":
                continue
            if info.section is not None:
                if info.name in spec.sections:
                    sections[info.name] = spec.sections[info.name]
                elif getattr(info.plugin, "always_active", False):
                    sections[info.name] = info.section()
                else:
                    continue
            taking_part[info.name] = info
        order = ordering.plan_order({name: info.plugin for name, info in taking_part.items()})
        return Host(spec, [taking_part[name] for name in order], sections)

    def _refuse_unusable(self, keys: Iterable[str]) -> None:
        """Raise for plugins that this load names and that cannot be had."""
        asked = set(keys)
        problems = []
        for info in self.plugins:
            in_spec = info.name in asked
            if info.status == "broken" and (in_spec or info.named):
                problems.append(
                    Problem(
                        where=info.name if in_spec else "",
                        plugin=info.name,
                        message=f"plugin {info.name!r} ({info.distribution}) is broken: {info.reason}",
                        fix=f"Mend or uninstall it, or leave it out with `-p no:{info.name}`.",
                    )
                )
            elif in_spec and info.status in ("blocked", "not selected"):
                problems.append(
                    Problem(
                        where=info.name,
                        plugin=info.name,
                        message=f"the spec has the section {info.name!r}, but the plugin"
                        f" {info.name!r} ({info.distribution}) is {info.status}",
                        fix=f"Remove the section, or select the plugin with `-p {info.name}`."
                        if info.status == "not selected"
                        else f"Remove the section or the block `no:{info.name}`.",
                    )
                )
        if problems:
            raise PluginError(problems)


def create_registry(
    plugins: Iterable[object] = (),
    *,
    select: Iterable[str] = (),
    block: Iterable[str] = (),
    autoload: bool | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Registry:
    """Make a registry from plugin objects and the installed distributions.

    :param plugins: plugin objects (or classes) to use beside the installed ones.
    :param select: names of installed plugins, or ``module:attribute``, to use whatever ``autoload``
        says; ``no:NAME`` blocks, as on the command line.
    :param block: names that must not be used; a blocked plugin is not imported.
    :param autoload: use every installed plugin. ``None``: unless the environment variable
        ``LLMLOAD_DISABLE_PLUGIN_AUTOLOAD`` is set. Built-in plugins count as installed ones, and
        are used without being selected.
    :param environ: ``LLMLOAD_PLUGINS`` (comma-separated) is read as more of ``select``.
    :raises PluginError: a selected name is not installed, or an object of ``plugins`` is no plugin.

    A plugin that cannot be imported or breaks the hook contract is kept as ``broken`` with the
    reason, and fails only a load that names it.
    """
    words = [*select, *(w.strip() for w in environ.get(PLUGINS_VARIABLE, "").split(","))]
    blocked = {*block, *(word.removeprefix("no:") for word in words if word.startswith("no:"))}
    named = [word for word in words if word and not word.startswith("no:")]
    if autoload is None:
        autoload = not environ.get(DISABLE_AUTOLOAD_VARIABLE)

    infos = [_from_object(plugin) for plugin in plugins]
    infos += [_from_object(_attribute(word)) for word in named if ":" in word]
    infos += _installed(set(named), autoload=autoload, blocked=blocked)
    for info in infos:
        if info.name in blocked:
            info.status = "blocked"
    missing = [word for word in named if ":" not in word and word not in {i.name for i in infos}]
    if missing:
        known = sorted({info.name for info in infos})
        raise PluginError(
            Problem(
                message=f"plugin {word!r} was selected, but no installed distribution provides it",
                fix=nearest(word, known) or f"Installed plugins are: {', '.join(known)}.",
            )
            for word in missing
        )
    _refuse_doubles(infos)
    _check_contracts(infos)
    for info in infos:
        # Given as an object, a broken plugin is the caller's own mistake: say so at once.
        if info.status == "broken" and info.distribution == _GIVEN:
            raise PluginError(f"plugin {info.name!r} breaks the hook contract: {info.reason}")
    return Registry(infos)


_GIVEN = "given as an object"


def _from_object(plugin: object) -> PluginInfo:
    plugin = plugin() if inspect.isclass(plugin) else plugin
    name = getattr(plugin, "name", None)
    if not isinstance(name, str) or not name:
        raise PluginError(
            f"{plugin!r} is not a plugin: it has no `name`",
            fix="Give it a class attribute `name`, its key in the spec.",
        )
    return PluginInfo(name, _GIVEN, builtin=False, status="active", named=True, plugin=plugin)


def _attribute(path: str) -> object:
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise PluginError(
            f"plugin {path!r} was selected, but cannot be imported: {error}",
            fix="Write it as `module:attribute`, and check that the module is on the path.",
        ) from error


def _installed(named: set[str], *, autoload: bool, blocked: set[str]) -> list[PluginInfo]:
    """Return one entry per name and distribution; only what is selected is imported."""
    infos = []
    for entry in metadata.entry_points(group=GROUP):
        owner = entry.dist
        distribution = f"{owner.metadata['Name']} {owner.version}" if owner else "unknown"
        builtin = owner is not None and owner.metadata["Name"] == GROUP
        info = PluginInfo(entry.name, distribution, builtin, "active", named=entry.name in named)
        if not (autoload or builtin or info.named):
            info.status = "not selected"
        elif entry.name not in blocked:
            _import(info, entry.load)
        infos.append(info)
    return infos


def _import(info: PluginInfo, load: Callable[[], Any]) -> None:
    try:
        plugin = load()
        info.plugin = plugin() if inspect.isclass(plugin) else plugin
    # SystemExit too: a module that exits at import must not end everybody's process.
    except (Exception, SystemExit) as error:
        info.status, info.reason = "broken", f"{type(error).__name__}: {error}"


def _refuse_doubles(infos: list[PluginInfo]) -> None:
    """Break all providers of one name, except a built-in: the others are broken for shadowing it."""
    providers: dict[str, list[PluginInfo]] = defaultdict(list)
    for info in infos:
        if info.status != "blocked":
            providers[info.name].append(info)
    for name, rivals in providers.items():
        if len(rivals) > 1:
            owners = " and ".join(sorted(info.distribution for info in rivals))
            for info in rivals:
                if not info.builtin:
                    info.status = "broken"
                    info.reason = f"the name {name!r} is provided by {owners}"


def _check_contracts(infos: Iterable[PluginInfo]) -> None:
    infos = [info for info in infos if info.status == "active"]
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    for info in infos:
        if hasattr(info.plugin, "Hooks"):
            manager.add_hookspecs(info.plugin.Hooks)
    for info in infos:
        faults = list(_faults(info, manager))
        if faults:
            info.status, info.reason = "broken", "; ".join(faults)


def _faults(info: PluginInfo, manager: pluggy.PluginManager) -> Iterable[str]:
    """Say what is wrong with a plugin before pluggy has seen any of it."""
    plugin = info.plugin
    name = getattr(plugin, "name", None)
    if name != info.name:
        yield f"its entry point is called {info.name!r}, but its `name` is {name!r}"
    if info.name in LoadSpec.model_fields:
        yield f"the name {info.name!r} is a core key of the spec"
    if info.section is not None:
        if not (inspect.isclass(info.section) and issubclass(info.section, BaseModel)):
            yield "its `Section` is not a pydantic model"
        elif info.section.model_config.get("extra") != "forbid":
            yield 'its `Section` does not forbid unknown keys: set `extra="forbid"`'
    specs = {n: vars(manager.hook)[n] for n in vars(manager.hook) if not n.startswith("_")}
    for attribute in dir(plugin):
        method = inspect.getattr_static(plugin, attribute)
        options = manager.parse_hookimpl_opts(plugin, attribute)
        if options is None:
            if attribute in specs and inspect.isfunction(method):
                yield f"`{attribute}` is not marked with @llmload.hookimpl"
            continue
        hook = options["specname"] or attribute
        if hook not in specs:
            yield f"`{hook}` is not a hook. {nearest(hook, specs)}".strip()
            continue
        if options["tryfirst"] or options["trylast"]:
            yield f"`{hook}` uses tryfirst or trylast: order is set with `after` and `before`"
        yield from _argument_faults(hook, getattr(plugin, attribute), specs[hook].spec.argnames)


def _argument_faults(hook: str, method: Any, allowed: tuple[str, ...]) -> Iterable[str]:
    for parameter in inspect.signature(method).parameters.values():
        if parameter.name not in allowed:
            yield (
                f"`{hook}` takes the argument {parameter.name!r}, the hook offers"
                f" {', '.join(allowed)}"
            )
        elif parameter.default is not parameter.empty:
            # pluggy 1.6 never fills in an argument that has a default.
            yield f"`{hook}` gives the argument {parameter.name!r} a default, which would hide it"
