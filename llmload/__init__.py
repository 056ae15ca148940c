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

if TYPE_CHECKING:
    from .context import LoadContext as LoadContext
    from .errors import AuditError as AuditError
    from .errors import CheckpointError as CheckpointError
    from .errors import LlmloadError as LlmloadError
    from .errors import LoadFailedError as LoadFailedError
    from .errors import PlanError as PlanError
    from .errors import PluginError as PluginError
    from .errors import Problem as Problem
    from .errors import RequestError as RequestError
    from .errors import SpecError as SpecError
    from .explain import InvalidValueError as InvalidValueError
    from .findings import Conflict as Conflict
    from .findings import Decline as Decline
    from .findings import Note as Note
    from .group import Group as Group
    from .group import GroupReport as GroupReport
    from .group import load_group as load_group
    from .group import plan_group as plan_group
    from .groupplan import GroupPlan as GroupPlan
    from .groupspec import AdapterSpec as AdapterSpec
    from .groupspec import GroupSpec as GroupSpec
    from .hookspecs import hookimpl as hookimpl
    from .hookspecs import hookspec as hookspec
    from .pipeline import LoadResult as LoadResult
    from .pipeline import load as load
    from .pipeline import plan as plan
    from .planning import Plan as Plan
    from .registry import Registry as Registry
    from .registry import create_registry as create_registry
    from .report import Report as Report
    from .spec import LoadSpec as LoadSpec
    from .spec import Section as Section

_HOME = {
    "LoadContext": "context",
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
    "InvalidValueError": "explain",
    **dict.fromkeys(("Conflict", "Decline", "Note"), "findings"),
    **dict.fromkeys(("Group", "GroupReport", "load_group", "plan_group"), "group"),
    "GroupPlan": "groupplan",
    **dict.fromkeys(("AdapterSpec", "GroupSpec"), "groupspec"),
    **dict.fromkeys(("hookimpl", "hookspec"), "hookspecs"),
    **dict.fromkeys(("LoadResult", "load", "plan"), "pipeline"),
    "Plan": "planning",
    **dict.fromkeys(("Registry", "create_registry"), "registry"),
    "Report": "report",
    **dict.fromkeys(("LoadSpec", "Section"), "spec"),
}

__version__ = "0.1.0"
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llmload' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
