"""A plan with all that carries it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmload.context.context import LoadContext
    from llmload.host.registry import Host
    from llmload.loading.plan import Plan
    from llmload.loading.rehearsal import Rehearsal


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A plan together with what the pipeline needs to carry it out."""

    plan: Plan
    host: Host
    ctx: LoadContext
    rehearsal: Rehearsal | None
    """None where the load could not be rehearsed."""
