"""The spec key ``parallel``: how torch spreads the model over the ranks, in transformers' words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from llmload import Section

Size = Annotated[int, Field(ge=1)]
Styles = Mapping[str, str]


class ParallelSection(Section):
    """How the model is spread over the ranks; names and meanings are those of transformers'
    ``DistributedConfig``."""

    fsdp_size: Size | None = None
    """Ranks that share one copy of the model, each with a part of every parameter (FSDP2). Null for
    all that the other sizes leave."""
    dp_replicate_size: Size = 1
    """Copies of the model, each over ``fsdp_size`` ranks (HSDP)."""
    tp_size: Size | None = None
    """Ranks that compute each layer together (tensor parallel). Null for 1, or with ``tp_plan`` for
    all that the other sizes leave."""
    ep_size: Size = 1
    """Ranks that share the experts of a mixture (expert parallel)."""
    fsdp_plan: Styles | None = None
    """Module, with ``*`` for numbers -> ``free_full_weight`` or ``keep_full_weight``: added to the
    units that transformers plans for this model."""
    tp_plan: Literal["auto"] | Styles | None = None
    """``auto`` for the model's own plan, or rules that replace some of it."""
    ep_plan: Styles | None = None
    """Rules that replace some of the model's own for its experts."""
    fsdp_cpu_offload: bool = False
    """Keep the parts in host memory between uses."""
    fsdp_mixed_precision: bool = False
    """Compute in bfloat16 and reduce gradients in float32, whatever the parameters' dtype."""
    deadline: Annotated[float, Field(gt=0)] = 15.0
    """Seconds after which a rank that gives no sign of life stops the load on all ranks."""
    digests: bool = False
    """Have every rank read all weights once more and compare digests of them with rank 0's; without
    it they compare a sample of every tensor."""
