"""Which plugins there are: given as objects, selected by path, installed as distributions."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from opcode import opmap
from time import perf_counter
from typing import Any, Final, Literal

from pydantic import BaseModel

from llmload import hookspecs
from llmload.errors import PluginError
from llmload.host.distributions import name_and_version

GROUP = "llmload"
GIVEN = "given as an object"
SLOW: Final = 2.0
"""Seconds of an import that people are told of."""

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
    built: bool = False
    """Whether it was found out if its section can be built."""
    plugin: Any = field(default=None, repr=False)

    @property
    def section(self) -> type[BaseModel] | None:
        """The pydantic model of its spec key, if it has one."""
        return getattr(self.plugin, "Section", None)

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of the hooks it implements: the manual's in its order, then other plugins'."""
        plugin = self.plugin
        marked = [] if self.status != "active" else [*dict.fromkeys(h for h, _ in _marked(plugin))]
        known = (*hookspecs.HELPERS, *hookspecs.SPINE)
        return (
            *(name for name in known if name in marked),
            *sorted(name for name in marked if name not in known),
        )


def _marked(plugin: object) -> Iterator[tuple[str, Any]]:
    """Yield the hook that an attribute is marked as, and the attribute, for each that is."""
    for name in dir(plugin):
        attribute = getattr(plugin, name, None) if name[:2] != "__" else None
        options = getattr(attribute, f"{GROUP}_impl", None)
        if isinstance(options, dict):
            yield options["specname"] or name, attribute


def implementations(plugin: object, hook: str) -> Iterator[tuple[bool, str]]:
    """Yield of each of a plugin's implementations whether it is a wrapper, and file and line."""
    for name, attribute in _marked(plugin):
        if name == hook:
            function = inspect.unwrap(attribute)
            code = getattr(getattr(function, "__func__", function), "__code__", None)
            place = f"{code.co_filename}:{code.co_firstlineno}" if code is not None else "unknown"
            yield bool(getattr(attribute, f"{GROUP}_impl")["wrapper"]), place


def from_object(plugin: object) -> PluginInfo:
    """Take a plugin object or class as it is.

    :raises PluginError: it has no name, or cannot be made without arguments.
    """
    if inspect.isclass(plugin):
        made_by: type = plugin
        try:
            plugin = made_by()
        except Exception as error:
            raise PluginError(
                f"plugin {made_by.__qualname__!r} cannot be made: {type(error).__name__}: {error}",
                fix="A plugin class takes no arguments; give an object instead.",
            ) from error
    name = getattr(plugin, "name", None)
    if not isinstance(name, str) or not name:
        raise PluginError(
            f"an object of type {type(plugin).__qualname__} is not a plugin: it has no `name`",
            fix="Give it a class attribute `name`, its key in the spec.",
        )
    return PluginInfo(name, GIVEN, builtin=False, status="active", named=True, plugin=plugin)


def attribute(path: str) -> object:
    """Import what ``module:attribute`` names.

    :raises PluginError: there is no such thing, or the module fails or exits when it is imported.
    """
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:  # no module name: ValueError
        raise PluginError(
            f"plugin {path!r} was selected, but cannot be imported: {error}",
            fix="Write it as `module:attribute`, and check that the module is on the path.",
        ) from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not _was_raised(error):
            raise
        raise PluginError(
            f"plugin {path!r} was selected, and its module fails when it is imported:"
            f" {type(error).__name__}: {error}",
            fix="Mend the module, or leave the plugin out.",
        ) from error


def installed(named: set[str], *, autoload: bool, blocked: set[str]) -> list[PluginInfo]:
    """Return one entry per name and distribution; only what is selected is imported."""
    infos = []
    owned_by = cache(name_and_version)  # one distribution has many plugins
    for entry in _entry_points():
        owner, version = owned_by(entry.dist) if entry.dist else ("unknown", "")
        info = PluginInfo(
            name=entry.name,
            distribution=f"{owner} {version}",
            builtin=owner == GROUP and _is_own(entry),
            status="active",
            named=entry.name in named,
        )
        if not (autoload or info.builtin or info.named):
            info.status = "not selected"
        elif entry.name not in blocked:
            _import(info, entry.load)
        infos.append(info)
    return infos


def _entry_points() -> Iterator[metadata.EntryPoint]:
    """Yield what is installed for the group, leaving out distributions that cannot be read.

    Of two distributions of one name the first on the path counts, as for an import. One that calls
    itself llmload hides no built-in plugin by that.
    """
    seen: dict[str, object] = {}
    for distribution in metadata.distributions():
        entries: list[metadata.EntryPoint] = []
        with suppress(Exception):  # a file that is no text, or has no such syntax
            # To take the file apart takes three times as long as to read it, and few name us.
            if GROUP in (distribution.read_text("entry_points.txt") or ""):
                entries += distribution.entry_points.select(group=GROUP)
        for entry in entries:
            name = entry.name if _is_own(entry) else name_and_version(distribution)[0].lower()
            if seen.setdefault(name, distribution) is distribution:
                yield entry


def _is_own(entry: metadata.EntryPoint) -> bool:
    return entry.value.startswith(f"{GROUP}.builtin.")


def _import(info: PluginInfo, load: Callable[[], Any]) -> None:
    """Import a plugin; what it writes to standard output, which is for data, goes to people."""
    start = perf_counter()
    try:
        with nullcontext() if info.builtin else redirect_stdout(sys.stderr):
            plugin = load()
            info.plugin = plugin() if inspect.isclass(plugin) else plugin
    # Whatever it is: a module that exits at import must not end everybody's process.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not _was_raised(error):
            raise
        info.status, info.reason = "broken", f"{type(error).__name__}: {error}"
    seconds = perf_counter() - start
    if seconds > SLOW and not info.builtin:
        logging.getLogger(GROUP).warning(
            "importing plugin %r (%s) took %.1f s, which every command waits for; leave it out with"
            " `-p no:%s`",
            info.name,
            info.distribution,
            seconds,
            info.name,
        )


def _was_raised(error: KeyboardInterrupt) -> bool:
    """Say whether code raised an interrupt by itself: Ctrl-C comes between two instructions."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return False
    return place.tb_frame.f_code.co_code[place.tb_lasti] == opmap["RAISE_VARARGS"]


def take_place_of_installed(infos: Iterable[PluginInfo]) -> list[PluginInfo]:
    """Leave out an installed plugin that was given as an object too, or that is not in use.

    An object of the installed plugin's class is that plugin, and counts as its distribution's.
    """
    given = {info.name: info for info in infos if info.distribution == GIVEN}
    kept = []
    for info in infos:
        twin = given.get(info.name)
        if twin is None or info.distribution == GIVEN:
            kept.append(info)
        elif type(info.plugin) is type(twin.plugin):
            twin.distribution, twin.builtin = info.distribution, info.builtin
        elif info.status != "not selected":
            kept.append(info)
    return kept


def break_doubles(infos: Iterable[PluginInfo]) -> None:
    """Break all providers of one name; a built-in among them survives those that shadow it."""
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
