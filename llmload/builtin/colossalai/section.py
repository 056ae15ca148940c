"""The spec key ``colossalai``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmload.plugin import Section

MATERIALISE = "Use `materialize: true`."
"""The way out of all that a lazy model cannot have."""


class ColossalaiSection(Section):
    """Lazy initialisation, and who ends it."""

    materialize: bool = True
    """true: every tensor is filled while loading. false: parameters stay lazy until
    ``Booster.boost`` shards the model and loads the checkpoint, which is recorded with it."""
    plugin: (
        Literal["HybridParallelPlugin", "GeminiPlugin", "LowLevelZeroPlugin", "TorchDDPPlugin"]
        | None
    ) = None
    """The Booster plugin that the model is meant for, so that the plan can say what is known not to
    work. Nothing of it is set up."""
    tp_size: int = Field(default=1, ge=1)
    """Tensor-parallel size that the Booster plugin will be given."""
    pp_size: int = Field(default=1, ge=1)
    """Pipeline-parallel size that it will be given."""
