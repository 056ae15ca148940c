"""What is installed here and what this machine has: the text to paste into a bug report."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping
from typing import Final

from pydantic import BaseModel, Field

from llmload.checkpoint.copying import cores
from llmload.errors import PluginError, Problem, RequestError
from llmload.host import compatibility as compatible
from llmload.host import ordering
from llmload.host.compatibility import Compatibility
from llmload.host.contract import manager_of
from llmload.host.discovery import PluginInfo, Status, implementations
from llmload.host.distributions import installed_versions, version_of
from llmload.host.registry import Registry
from llmload.spec.loadspec import LoadSpec
from llmload.spec.suggest import nearest

_OTHERS: Final = (
    "huggingface_hub",
    "numpy",
    "pluggy",
    "pydantic",
    "rich",
    "tokenizers",
    "triton",
    "typer",
)
_VARIABLES: Final = (
    "CUDA_VISIBLE_DEVICES",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "LLMLOAD_DISABLE_PLUGIN_AUTOLOAD",
    "LLMLOAD_PLUGINS",
    "LOCAL_RANK",
    "OMP_NUM_THREADS",
    "RANK",
    "TRANSFORMERS_OFFLINE",
    "TRANSFORMERS_VERBOSITY",
    "WORLD_SIZE",
)
_SECRET: Final = "HF_TOKEN"


class PluginEntry(BaseModel):
    """One line of ``llmload plugins``."""

    name: str
    """Also its key in the spec, where it has a section."""
    distribution: str
    """Distribution and version, or where a plugin object came from."""
    builtin: bool
    """Whether it comes with llmload."""
    status: Status
    """Only an active plugin can take part in a load."""
    reason: str = ""
    """Why it is broken."""
    section: bool
    """Whether it has a spec key; without one it takes part in every load."""
    does: str = ""
    """What it does, in the first paragraph of its docstring."""
    hooks: list[str]
    """The hooks that it implements, in the manual's order."""


class PluginList(BaseModel):
    """All plugins that are known here."""

    plugins: list[PluginEntry]
    """Active ones in plan order, then the others by name."""
    problems: list[Problem] = Field(default_factory=list)
    """Why the active plugins cannot be ordered, if they cannot; they then stand by name."""


class HookEntry(BaseModel):
    """One plugin's implementation of one hook."""

    hook: str
    """The hook's name."""
    plugin: str
    """Who implements it."""
    distribution: str
    """Distribution and version, or where a plugin object came from."""
    wrapper: bool = False
    """Whether it goes around the others' answers instead of giving one."""
    code: str
    """File and line where it begins."""


class HookList(BaseModel):
    """Who implements a hook, or what a plugin implements."""

    hooks: list[HookEntry]
    """Of a hook in the order in which plugins are called; of a plugin in the manual's order."""


class Environment(BaseModel):
    """Versions, machine, variables and plugins. Holds no secret."""

    versions: dict[str, str]
    """Python and the installed libraries that matter to a load."""
    platform: str
    """Operating system, release and processor architecture."""
    processors: int
    """Processors that this process may use."""
    memory_bytes: int
    """Physical memory of the machine."""
    devices: list[str]
    """Accelerators that torch sees, or why torch cannot say."""
    variables: dict[str, str]
    """Environment variables that change a load, as far as they are set."""
    plugins: list[PluginEntry]
    """As ``llmload plugins`` lists them."""


def list_plugins(registry: Registry) -> PluginList:
    """Return every plugin the registry knows, usable or not."""
    active = {info.name: info for info in registry.plugins if info.status == "active"}
    problems: Iterable[Problem] = ()
    try:
        order = ordering.plan_order({name: info.plugin for name, info in active.items()})
    except PluginError as error:
        order, problems = sorted(active), error.problems
    others = [info for info in registry.plugins if info.status != "active"]
    infos = [*(active[name] for name in order), *others]
    return PluginList(plugins=[_entry(info) for info in infos], problems=list(problems))


def list_hooks(registry: Registry, name: str) -> HookList:
    """Return who implements the hook ``name``, or what the plugin of that name implements.

    :raises RequestError: nothing is called so.
    """
    listed = list_plugins(registry).plugins
    active = {info.name: info.plugin for info in registry.plugins if info.status == "active"}
    manager = manager_of(active.values())
    hooks = [hook for hook in vars(manager.hook) if not hook.startswith("_")]
    if name not in (*hooks, *active):
        raise RequestError(
            Problem(
                where="--hooks",
                message=f"{name!r} is neither a hook nor a plugin that works here",
                fix=nearest(name, [*hooks, *active]) or f"Hooks are: {', '.join(hooks)}.",
            )
        )
    return HookList(
        hooks=[
            HookEntry(
                hook=hook,
                plugin=entry.name,
                distribution=entry.distribution,
                wrapper=wrapper,
                code=code,
            )
            for entry in listed
            for hook in entry.hooks
            if name in (hook, entry.name)
            for wrapper, code in implementations(active[entry.name], hook)
        ]
    )


def describe(registry: Registry, environ: Mapping[str, str] = os.environ) -> Environment:
    """Look around. Imports torch, where it is installed, to ask for devices."""
    others = {name: version for name in _OTHERS if (version := version_of(name))}
    return Environment(
        versions=installed_versions() | others,
        platform=platform.platform(),
        processors=cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        devices=_devices(),
        variables={name: _shown(name, environ[name]) for name in _VARIABLES if name in environ},
        plugins=list_plugins(registry).plugins,
    )


def _entry(info: PluginInfo) -> PluginEntry:
    return PluginEntry(
        name=info.name,
        distribution=info.distribution,
        builtin=info.builtin,
        status=info.status,
        reason=info.reason,
        section=info.section is not None,
        does=_does(info.plugin),
        hooks=list(info.hooks),
    )


def _does(plugin: object) -> str:
    """Return the first paragraph of a plugin's docstring, in one line."""
    text = getattr(plugin, "__doc__", None)
    return " ".join(text.partition("\n\n")[0].split()) if isinstance(text, str) else ""


def _devices() -> list[str]:
    if version_of("torch") is None:
        return []
    try:
        import torch
    # A torch built for another CUDA or libc fails with OSError.
    except (ImportError, OSError) as error:
        return [f"torch cannot be imported: {error}"]
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        return [f"{card.name}, {card.total_memory / 2**30:.1f} GiB" for card in cards]
    return ["mps"] if torch.backends.mps.is_available() else []


def _shown(name: str, value: str) -> str:
    if name == _SECRET:
        return "set, not shown" if value else "empty"
    return re.sub(r"//[^/@]*@", "//...@", value)


def compatibility(registry: Registry, names: Iterable[str] = ()) -> Compatibility:
    """Return what cannot be combined among the plugins that are installed.

    :param names: sections or core keys; only pairs of one of them, or of two of them.
    :raises RequestError: one is none that a spec can have.
    """
    active = [info for info in registry.plugins if info.status == "active"]
    whole = compatible.table(active, LoadSpec.model_fields)
    asked = list(dict.fromkeys(names))
    known = [*whole.sections, *LoadSpec.model_fields]
    for name in asked:
        if name not in known:
            raise RequestError(
                f"no spec has a key {name!r}",
                fix=nearest(name, known) or f"Sections are: {', '.join(whole.sections)}.",
            )
    least = min(len(asked), 2)
    pairs = [p for p in whole.pairs if len({p.one, p.other} & set(asked)) >= least]
    stacks = [s for s in whole.stacks if not asked or s.section in asked]
    return whole.model_copy(update={"pairs": pairs, "stacks": stacks})
