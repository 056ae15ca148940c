"""The hook contract, checked before pluggy sees a plugin: a whole plugin is registered, or none.

pluggy alone lets a misspelt hook pass in silence, never fills in an argument that has a default
(1.6), and keeps calling the earlier hooks of a plugin whose registration failed half-way (1.6).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import pluggy
from pydantic import BaseModel, PydanticUserError

from llmload import hookspecs
from llmload.host.discovery import GROUP, PluginInfo
from llmload.spec.loadspec import LoadSpec
from llmload.spec.suggest import nearest


def break_faulty(infos: Iterable[PluginInfo]) -> None:
    """Mark the active plugins that break the contract as broken, with every fault.

    Built-in ones are held to it by the tests, and not looked at again in every load.
    """
    active = [info for info in infos if info.status == "active"]
    others = [info for info in active if not info.builtin]
    if not others:
        return
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    for info in active:
        if hasattr(info.plugin, "Hooks"):
            manager.add_hookspecs(info.plugin.Hooks)
    for info in others:
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
    section: object = getattr(plugin, "Section", None)
    if section is not None:
        if not (inspect.isclass(section) and issubclass(section, BaseModel)):
            yield "its `Section` is not a pydantic model"
        elif section.model_config.get("extra") != "forbid":
            yield 'its `Section` does not forbid unknown keys: set `extra="forbid"`'
        else:
            try:
                section.model_rebuild()  # a subclass of llmload.Section is not built until now
            except PydanticUserError as error:
                yield f"its `Section` cannot be built: {error.message.splitlines()[0]}"
    specs = {n: vars(manager.hook)[n] for n in vars(manager.hook) if not n.startswith("_")}
    for attribute in dir(plugin):
        if attribute.startswith("__"):  # no hook is, and looking at each takes a while
            continue
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
