"""The host: finds plugins, refuses the broken ones by name, and calls the others in one order.

``create_registry`` looks at the installed distributions and makes a :class:`Registry`;
``Registry.activate`` picks the plugins that take part in one load and returns their
:class:`Host`. pluggy does the calling; plugins are registered so that its last-registered-first
becomes plan order.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import ModuleType
from typing import Any

import pluggy
from pydantic import BaseModel

from llmload import hookspecs
from llmload.context.peers import Peer
from llmload.errors import (
    LlmloadError,
    LoadFailedError,
    PluginError,
    Problem,
    RequestError,
    SpecError,
)
from llmload.host import ordering
from llmload.host.contract import CORE_KEYS, break_faulty, break_unbuildable
from llmload.host.discovery import (
    GROUP,
    PluginInfo,
    attribute,
    break_doubles,
    from_object,
    installed,
    take_place_of_installed,
)
from llmload.spec import files, groupspec
from llmload.spec.groupspec import GroupSpec
from llmload.spec.loadspec import LoadSpec, validate
from llmload.spec.renaming import RULES, KeyRule
from llmload.spec.suggest import nearest

PLUGINS_VARIABLE = "LLMLOAD_PLUGINS"
DISABLE_AUTOLOAD_VARIABLE = "LLMLOAD_DISABLE_PLUGIN_AUTOLOAD"


class _Manager(pluggy.PluginManager):
    """A plugin manager that can call one plugin's implementation of a hook."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        """Look at no attribute that every object has: looking at each takes a while."""
        return None if name.startswith("__") else super().parse_hookimpl_opts(plugin, name)

    def add(self, plugin: object, name: str) -> None:
        """Register a plugin by its name, one that cannot be hashed too: a dataclass, for instance.

        pluggy hashes plugins to leave some out; for such a one stands what holds its hooks.
        """
        if type(plugin).__hash__ is None:
            found = ((hook, self.parse_hookimpl_opts(plugin, hook)) for hook in dir(plugin))
            hooks = [hook for hook, options in found if options is not None]
            plugin = _Standing({hook: getattr(plugin, hook) for hook in hooks})
        self.register(plugin, name=name)

    def call_one(self, name: str, hook: str, **kwargs: Any) -> Any:
        """Call a plugin's ``hook`` through pluggy; returns its result, None included."""
        others = [
            impl.plugin
            for impl in getattr(self.hook, hook).get_hookimpls()
            if impl.plugin_name != name and not impl.wrapper
        ]
        results = self.subset_hook_caller(hook, others)(**kwargs)
        return results[0] if results else None


class _Standing:
    """Has the hooks of a plugin as attributes."""

    def __init__(self, hooks: Mapping[str, Any]) -> None:
        vars(self).update(hooks)


class Host:
    """The plugins of one load, in plan order. Made by :meth:`Registry.activate`."""

    def __init__(
        self,
        spec: LoadSpec,
        infos: list[PluginInfo],
        sections: Mapping[str, BaseModel],
        key_rules: Mapping[str, KeyRule] = RULES,
    ) -> None:
        self.key_rules = key_rules
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
            self._manager.add(info.plugin, info.name)
        # Misspelt hooks were found with the contracts; one that is unknown here belongs to a plugin
        # that takes no part, and is never called.
        self.hook = self._manager.hook

    @property
    def names(self) -> tuple[str, ...]:
        """The active plugins in plan order."""
        return tuple(info.name for info in self.infos)

    def implementing(self, hook: str, *, wrappers: bool = False) -> list[str]:
        """Names of the active plugins that implement ``hook``, or wrap it too, in plan order."""
        found = {
            impl.plugin_name
            for impl in getattr(self.hook, hook).get_hookimpls()
            if wrappers or not impl.wrapper
        }
        return [name for name in self.names if name in found]

    def shaping(self, hook: str) -> list[str]:
        """Those of them that change names, shapes or ``requires_grad``: they are rehearsed."""
        return [
            name
            for name in self.implementing(hook)
            if getattr(self._by_name[name].plugin, "rehearsed", True)
        ]

    def auditing_rehearsals(self) -> list[str]:
        """Those whose ``audit`` the plan asks of the rehearsed model, too."""
        return [
            name
            for name in self.implementing("audit")
            if getattr(self._by_name[name].plugin, "audits_rehearsal", False)
        ]

    def call(self, name: str, hook: str, **kwargs: Any) -> Any:
        """Call one plugin's ``hook``. Errors of the request get the plugin's name.

        A hook that yields is run to its end here, so that its errors are told the same way.
        """
        try:
            result = self._manager.call_one(name, hook, **kwargs)
            return list(result) if isinstance(result, Iterator) else result
        except RequestError as error:
            error.problems = tuple(problem.of(name) for problem in error.problems)
            raise

    def declared(self, hook: str) -> bool:
        """Say whether a hook is known here: one of llmload's, or of a plugin that takes part."""
        caller = getattr(self.hook, hook, None)
        return caller is not None and caller.has_spec()

    def each(self, hook: str, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """Ask every plugin that implements ``hook``, one after the other."""
        for name in self.implementing(hook) if self.declared(hook) else ():
            with self._blaming(name, hook):
                result = self.call(name, hook, **kwargs)
            yield name, result

    def first(self, hook: str, **kwargs: Any) -> tuple[str | None, Any]:
        """Ask until a plugin does not return None; wrappers go around the whole.

        pluggy does not tell who answered: it gets one implementation beside the wrappers, which
        asks the others in turn.
        """
        if not self.declared(hook):
            return None, None
        caller = getattr(self.hook, hook)
        impls = caller.get_hookimpls()
        answering = self.implementing(hook)
        wrapping = [impl.plugin_name for impl in impls if impl.wrapper]
        answered: str | None = None

        def ask_in_turn() -> Any:
            nonlocal answered
            for name in answering:
                others = [impl.plugin for impl in impls if impl.plugin_name != name]
                with self._blaming(name, hook):
                    result = self._manager.subset_hook_caller(hook, others)(**kwargs)
                if result is not None:
                    answered = name
                    return result
            return None

        if not wrapping:
            result = ask_in_turn()
            return answered, result
        plain = [impl.plugin for impl in impls if not impl.wrapper]
        around = self._manager.subset_hook_caller(hook, plain)
        with self._blaming(", ".join(wrapping), hook):
            result = around.call_extra([ask_in_turn], kwargs)
        return answered, result

    @contextmanager
    def _blaming(self, name: str, hook: str) -> Iterator[None]:
        """Tell what a plugin did not mean to raise as its failure in ``hook``."""
        try:
            yield
        except LlmloadError:
            raise
        except Exception as error:
            raise LoadFailedError(
                f"plugin {name!r} failed in {hook}: {type(error).__name__}: {error}"
            ) from error

    @property
    def peers(self) -> dict[str, Peer]:
        """What each active plugin declares to the others, in plan order."""
        return {
            info.name: Peer(
                info.distribution,
                frozenset(getattr(info.plugin, "provides", ()))
                - getattr(self.sections.get(info.name), "withholds", frozenset()),
            )
            for info in self.infos
        }

    def describe(self, name: str) -> str:
        """Return ``'name' (distribution version)`` for messages."""
        return f"{name!r} ({self._by_name[name].distribution})"


class Registry:
    """All plugins that are known here: selected, blocked, broken, or not asked for."""

    def __init__(self, infos: Iterable[PluginInfo]) -> None:
        self._plugins: tuple[PluginInfo, ...] = tuple(sorted(infos, key=lambda info: info.name))

    @property
    def plugins(self) -> tuple[PluginInfo, ...]:
        """Every plugin, by name, each held to the whole contract."""
        break_unbuildable(self._plugins)
        return self._plugins

    @property
    def broken(self) -> tuple[PluginInfo, ...]:
        """The plugins that are known to be broken, without trying to build a section of any."""
        return tuple(info for info in self._plugins if info.status == "broken")

    @property
    def sections(self) -> dict[str, type[BaseModel]]:
        """The spec keys that plugins own, with their pydantic models."""
        return {
            info.name: info.section
            for info in self._plugins
            if info.status == "active" and info.section is not None
        }

    @property
    def key_rules(self) -> dict[str, KeyRule]:
        """What a spec's ``key_rules`` can name: llmload's own rules, and those of the plugins."""
        found = dict(RULES)
        for info in self._plugins:
            if info.status == "active":
                found |= getattr(info.plugin, "key_rules", {})
        return found

    def validate(self, source: files.SpecLike) -> LoadSpec:
        """Read a spec and check it, sections included.

        :raises SpecError: with every fault at once.
        :raises PluginError: a key of the spec belongs to a broken or blocked plugin.
        """
        document = files.read(source)
        if groupspec.is_group(document.data):
            problem = Problem(
                where=groupspec.MODELS,
                message="this is a group of models, and one model was to be loaded",
                fix="Use `llmload.load_group` or `llmload.plan_group`.",
            )
            raise SpecError(document.placed([problem]))
        self._refuse_unusable(_said(document.data))
        data = self._without_idle_nulls(document.data)
        return validate(replace(document, data=data), self.sections, key_rules=self.key_rules)

    def validate_group(self, source: files.SpecLike) -> GroupSpec:
        """Read a group of models and check it, sections included; ``like`` is resolved.

        :raises SpecError: with every fault at once.
        :raises PluginError: a key of a member belongs to a broken or blocked plugin.
        """
        document = files.read(source)
        if not groupspec.is_group(document.data):
            problem = Problem(
                where=groupspec.MODELS,
                message="a group has the key `models`, and there is none",
                fix="Use `llmload.load` or `llmload.plan` for one model.",
            )
            raise SpecError(document.placed([problem]))
        members = document.data[groupspec.MODELS]
        for name, keys in members.items() if isinstance(members, Mapping) else ():
            with groupspec.naming(name):
                self._refuse_unusable(_said(keys))
        if isinstance(members, Mapping):
            members = {name: self._without_idle_nulls(keys) for name, keys in members.items()}
        data = {**document.data, groupspec.MODELS: members}
        return groupspec.validate(
            replace(document, data=data), self.sections, key_rules=self.key_rules
        )

    def _without_idle_nulls(self, keys: Any) -> Any:
        """Leave out nulls for plugins that take no part here: that is what they ask for."""
        if not isinstance(keys, Mapping):
            return keys
        idle = {info.name for info in self._plugins} - self.sections.keys()
        return {key: value for key, value in keys.items() if value is not None or key not in idle}

    def activate(self, spec: LoadSpec) -> Host:
        """Return the plugins that take part in a load of ``spec``, ordered and ready to be called.

        :raises PluginError: the load names a plugin that is broken, or the order has a cycle.
        """
        self._refuse_unusable(spec.sections)
        taking_part: dict[str, PluginInfo] = {}
        sections: dict[str, BaseModel] = {}
        always = [i for i in self._plugins if getattr(i.plugin, "always_active", False)]
        break_unbuildable(always)
        for info in self._plugins:
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
        order = _order(taking_part, spec)
        return Host(spec, [taking_part[name] for name in order], sections, self.key_rules)

    @contextmanager
    def telling(self, source: files.SpecLike, begun: Collection[str] = ()) -> Iterator[None]:
        """Call ``stopped`` of the plugins that a spec names if the block fails.

        Of a group, with the first member that names the plugin.

        :param begun: plugins that need not be told, as their turn in ``init_context`` had come.
            May be filled while the block runs.
        """
        try:
            yield
        except BaseException as error:
            # Whatever goes wrong here, the error itself is what the caller must see.
            with suppress(Exception, SystemExit):
                self._tell(files.read(source).data, error, begun)
            raise

    def announce(self, source: files.SpecLike) -> None:
        """Call ``started`` of every installed plugin. Whatever one raises is dropped."""
        with suppress(Exception, SystemExit):
            asked = files.read(source).data
            for info in self._plugins:
                if info.status == "active" and hasattr(info.plugin, "started"):
                    self._call_apart(info, "started", asked=_own(asked, info.name) or _any(asked))

    def ask(self, hook: str, **kwargs: Any) -> Iterator[tuple[str, list[Any]]]:
        """Ask every installed plugin, of a load or not; yield its name and what it found.

        One that fails is left out: it is asked for advice, and the load may do without.
        """
        for info in self._plugins:
            if info.status == "active" and hasattr(info.plugin, hook):
                found: list[Any] = []
                with suppress(Exception, SystemExit):
                    found = list(self._called_apart(info, hook, **kwargs) or ())
                yield info.name, found

    def _tell(self, asked: Mapping[str, Any], error: BaseException, begun: Collection[str]) -> None:
        for info in self._plugins:
            own = _own(asked, info.name)
            if info.status == "active" and own is not None and info.name not in begun:
                self._call_apart(info, "stopped", asked=own, error=error)

    def _call_apart(self, info: PluginInfo, hook: str, **kwargs: Any) -> None:
        """Call a hook of one plugin apart from any load, and drop what it raises."""
        with suppress(Exception, SystemExit):
            self._called_apart(info, hook, **kwargs)

    def _called_apart(self, info: PluginInfo, hook: str, **kwargs: Any) -> Any:
        # Of this hook alone: to look through all of a plugin takes ten times as long.
        declared = ModuleType(hookspecs.__name__)
        setattr(declared, hook, getattr(hookspecs, hook))
        manager = _Manager(GROUP)
        manager.add_hookspecs(declared)
        manager.add(_Standing({hook: getattr(info.plugin, hook)}), info.name)
        return manager.call_one(info.name, hook, **kwargs)

    def _refuse_unusable(self, keys: Iterable[str]) -> None:
        """Raise for plugins that this load names and that cannot be had."""
        asked = set(keys)
        problems = []
        break_unbuildable(info for info in self._plugins if info.name in asked)
        for info in self._plugins:
            in_spec = info.name in asked - CORE_KEYS
            if info.status == "broken" and (in_spec or info.named):
                problems.append(
                    Problem(
                        where=info.name if in_spec else "",
                        plugin=info.name,
                        message=f"plugin {info.name!r} ({info.distribution}) is broken:"
                        f" {info.reason}",
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


def _members(asked: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the specs of a group, or the one that is none, before anything of them is checked."""
    members = asked.get(groupspec.MODELS)
    found = list(members.values()) if isinstance(members, Mapping) else [asked]
    return [spec for spec in found if isinstance(spec, Mapping)]


def _own(asked: Mapping[str, Any], plugin: str) -> Mapping[str, Any] | None:
    """Return the first spec that has a plugin's section."""
    return next((spec for spec in _members(asked) if plugin in _said(spec)), None)


def _any(asked: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(iter(_members(asked)), {})


def _order(taking_part: dict[str, PluginInfo], spec: LoadSpec) -> list[str]:
    """Order plugins; those that nobody asked for are broken and left out where they cannot be.

    :raises CircleError: plugins that are asked for contradict one another.
    """
    while True:
        try:
            return ordering.plan_order({name: info.plugin for name, info in taking_part.items()})
        except ordering.CircleError as error:
            unasked = [
                info
                for info in (taking_part[name] for name in dict.fromkeys(error.circle))
                if not (info.builtin or info.named or info.name in spec.sections)
            ]
            if not unasked:
                raise
            for info in unasked:
                info.status = "broken"
                info.reason = f"its order contradicts others': {' -> '.join(error.circle)}"
                del taking_part[info.name]


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

    infos = [from_object(plugin) for plugin in plugins]
    infos += [from_object(attribute(word)) for word in named if ":" in word]
    given = list(infos)
    infos += installed(set(named), autoload=autoload, blocked=blocked)
    infos = take_place_of_installed(infos)
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
    break_doubles(infos)
    break_faulty(infos)
    break_unbuildable(given)
    for info in given:
        # Given as an object, a broken plugin is the caller's own mistake: say so at once.
        if info.status == "broken":
            raise PluginError(f"plugin {info.name!r} breaks the hook contract: {info.reason}")
    return Registry(infos)


def _said(keys: object) -> list[str]:
    """Return the keys of a spec or member; one with null is left out."""
    found = keys.items() if isinstance(keys, Mapping) else ()
    return [key for key, value in found if value is not None]
