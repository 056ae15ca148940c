"""The spec key ``bottleneck``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

import llmload
from llmload.plugin import InvalidValueError


class Shape(llmload.Section):
    """What an adapter consists of; saved with its weights."""

    size: Annotated[int, Field(ge=1, le=2**16)] = 64
    """Width of each bottleneck."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("mlp",)
    """Modules whose output goes through a bottleneck: names, or how names end."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    """What stands between the two linear layers of a bottleneck."""


class BottleneckSection(Shape):
    """Bottleneck adapters behind modules of a frozen base, new or resumed."""

    adapter: Annotated[str, Field(min_length=1)] | None = None
    """Folder of a saved adapter to resume, which says everything else; null for a new one."""

    @model_validator(mode="after")
    def _one_says_it(self) -> BottleneckSection:
        given = sorted(self.model_fields_set & Shape.model_fields.keys())
        if self.adapter is not None and given:
            raise InvalidValueError(
                f"the adapter says its own `{given[0]}`",
                fix=f"Remove `{given[0]}`, or `adapter` for a new one.",
            )
        return self
