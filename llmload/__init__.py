"""A pluggy-based model-loading registry for LLM fine-tuning.

One spec says which model is wanted and how; plugins make it so::

    result = llmload.load("sft.yaml")
    result.model, result.tokenizer, result.plan, result.report

The hooks a plugin can implement are described in :mod:`llmload.hookspecs`. Importing this package
imports neither torch nor transformers; every name below is fetched on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmload import leaving

if TYPE_CHECKING:
    from llmload.context.context import LoadContext as LoadContext
    from llmload.context.machine import Machine as Machine
    from llmload.errors import AuditError as AuditError
    from llmload.errors import CheckpointError as CheckpointError
    from llmload.errors import Conflict as Conflict
    from llmload.errors import Decline as Decline
    from llmload.errors import Line as Line
    from llmload.errors import LlmloadError as LlmloadError
    from llmload.errors import LoadFailedError as LoadFailedError
    from llmload.errors import Note as Note
    from llmload.errors import PlanError as PlanError
    from llmload.errors import PluginError as PluginError
    from llmload.errors import Problem as Problem
    from llmload.errors import RequestError as RequestError
    from llmload.errors import SpecError as SpecError
    from llmload.group.loading import Group as Group
    from llmload.group.loading import GroupReport as GroupReport
    from llmload.group.loading import load_group as load_group
    from llmload.group.loading import plan_group as plan_group
    from llmload.group.planning import GroupPlan as GroupPlan
    from llmload.hookspecs import hookimpl as hookimpl
    from llmload.hookspecs import hookspec as hookspec
    from llmload.host.registry import Registry as Registry
    from llmload.host.registry import create_registry as create_registry
    from llmload.loading.pipeline import LoadResult as LoadResult
    from llmload.loading.pipeline import load as load
    from llmload.loading.pipeline import plan as plan
    from llmload.loading.plan import Plan as Plan
    from llmload.loading.report import Report as Report
    from llmload.saving.save import Saved as Saved
    from llmload.saving.save import save as save
    from llmload.spec.groupspec import AdapterSpec as AdapterSpec
    from llmload.spec.groupspec import GroupSpec as GroupSpec
    from llmload.spec.loadspec import LoadSpec as LoadSpec
    from llmload.spec.loadspec import Section as Section
    from llmload.spec.refusals import InvalidValueError as InvalidValueError

_HOME = {
    "LoadContext": "context.context",
    "Machine": "context.machine",
    **dict.fromkeys(
        (
            "AuditError",
            "CheckpointError",
            "LlmloadError",
            "LoadFailedError",
            "PlanError",
            "PluginError",
            "Problem",
            "RequestError",
            "SpecError",
        ),
        "errors",
    ),
    "InvalidValueError": "spec.refusals",
    **dict.fromkeys(("Conflict", "Decline", "Line", "Note"), "errors"),
    **dict.fromkeys(("Group", "GroupReport", "load_group", "plan_group"), "group.loading"),
    "GroupPlan": "group.planning",
    **dict.fromkeys(("AdapterSpec", "GroupSpec"), "spec.groupspec"),
    **dict.fromkeys(("hookimpl", "hookspec"), "hookspecs"),
    **dict.fromkeys(("LoadResult", "load", "plan"), "loading.pipeline"),
    "Plan": "loading.plan",
    **dict.fromkeys(("Registry", "create_registry"), "host.registry"),
    "Report": "loading.report",
    **dict.fromkeys(("Saved", "save"), "saving.save"),
    **dict.fromkeys(("LoadSpec", "Section"), "spec.loadspec"),
}

__version__ = "0.1.0"
__all__ = sorted(_HOME)


if not TYPE_CHECKING:  # a name that is not there is for mypy to find

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise leaving.lacking(__name__, name)
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        if not leaving.warn(f"{__name__}.{name}"):  # else it warns everybody who asks
            globals()[name] = value
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
