"""What works here: every plugin asked to try itself out, apart from any load."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, TypeAlias

from pydantic import BaseModel, Field

from llmload.cli.environment import PluginEntry, list_plugins
from llmload.errors import Note, PluginError, Problem
from llmload.host.discovery import PluginInfo
from llmload.host.distributions import installed_versions
from llmload.host.registry import Registry
from llmload.loading.planning import missing_requirements, require_stack
from llmload.spec.suggest import nearest

Health: TypeAlias = Literal[
    "works", "works in part", "does not work", "broken", "blocked", "not selected"
]
WORKING: tuple[Health, ...] = ("works", "works in part")


class Diagnosis(PluginEntry):
    """One plugin as it is listed, and tried out."""

    health: Health
    """Whether it can take part in a load; ``broken``: it cannot even be imported or called."""
    works: list[str] = Field(default_factory=list)
    """What it found to work."""
    problems: list[Problem] = Field(default_factory=list)
    """What does not, each with the way to get it."""


class Diagnoses(BaseModel):
    """The plugins, the stack they run on, and what that lacks for any load at all."""

    versions: dict[str, str]
    """Python and the installed libraries that matter to a load."""
    plugins: list[Diagnosis]
    """In the order of ``llmload plugins``."""
    problems: list[Problem] = Field(default_factory=list)
    """What stands in the way of every load."""

    def healthy(self, asked: Iterable[str]) -> bool:
        """Say whether every plugin ``asked`` for works; with none, whether nothing is broken."""
        if self.problems:
            return False
        asked = set(asked)
        if asked:
            return all(d.health in WORKING for d in self.plugins if d.name in asked)
        return all(found.health != "broken" for found in self.plugins)


def examine(registry: Registry, names: Iterable[str] = ()) -> Diagnoses:
    """Try out the plugins called ``names``, or all. Imports whatever they need.

    :raises PluginError: no plugin has one of the names.
    """
    infos = {info.name: info for info in registry.plugins}
    unknown = [name for name in names if name not in infos]
    if unknown:
        raise PluginError(
            Problem(
                message=f"there is no plugin {name!r}",
                fix=nearest(name, infos) or f"Plugins are: {', '.join(infos)}.",
            )
            for name in unknown
        )
    problems: tuple[Problem, ...] = ()
    try:
        require_stack()
    except PluginError as error:
        problems = error.problems
    asked = set(names) or set(infos)
    return Diagnoses(
        versions=installed_versions(),
        plugins=[
            _examine(infos[entry.name], entry, tried=not problems)
            for entry in list_plugins(registry).plugins
            if entry.name in asked
        ],
        problems=list(problems),
    )


def _examine(info: PluginInfo, entry: PluginEntry, *, tried: bool) -> Diagnosis:
    found = Diagnosis(**entry.model_dump(), health="works")
    if info.status != "active":
        found.health = info.status
        if info.reason:
            found.problems = [Problem(message=info.reason, fix="Mend or uninstall the plugin.")]
        return found
    if info.builtin and not tried:
        found.health = "does not work"  # all of them need torch and transformers
        return found
    found.problems = list(missing_requirements([info]))
    if not found.problems:
        try:
            for finding in _findings(info):
                if isinstance(finding, Note):
                    found.works.append(str(finding))
                else:
                    found.problems.append(finding)
        except PluginError as error:
            found.health, found.problems = "broken", list(error.problems)
            return found
        except (Exception, SystemExit) as error:  # whatever the libraries it tries raise
            problem = Problem(message=f"tried out, it fails: {type(error).__name__}: {error}")
            found.problems.append(problem)
    if any(problem.severity == "error" for problem in found.problems):
        found.health = "does not work"
    elif found.problems:
        found.health = "works in part"
    return found


def _findings(info: PluginInfo) -> Iterator[Problem | Note]:
    """Yield what a plugin says of itself.

    :raises PluginError: it yielded something that is neither a note nor a problem.
    """
    diagnose = getattr(info.plugin, "diagnose", None)
    for finding in (diagnose() if diagnose is not None else ()) or ():
        if not isinstance(finding, Problem | Note):
            raise PluginError(
                f"it yielded a {type(finding).__name__} from diagnose, which may yield"
                " llmload.Problem, llmload.Note",
                fix="Report this to its makers.",
            )
        yield finding
