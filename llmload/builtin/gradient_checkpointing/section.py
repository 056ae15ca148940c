"""The spec key ``gradient_checkpointing``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmload.builtin.gradient_checkpointing.spellings import SPELLINGS
from llmload.plugin import InvalidValueError, Section


class GradientCheckpointingSection(Section):
    """How layers are recomputed in the backward pass instead of keeping their activations.

    The first three keys are those of ``torch.utils.checkpoint.checkpoint``.
    """

    spellings = SPELLINGS

    use_reentrant: bool = False
    """Use torch's older variant. DeepSpeed ZeRO-3 with an adapter needs it."""
    preserve_rng_state: bool = True
    """Recompute with the random state of the forward; without dropout, false is a little faster."""
    determinism_check: Literal["default", "none"] = "default"
    """Compare shapes and dtypes of the recomputed tensors with the first ones."""
    every_n_layers: Annotated[int, Field(ge=1)] = 1
    """Checkpoint every n-th layer only: more memory, less time."""
    offload: bool = False
    """Keep what the recomputation starts from in host memory."""

    @model_validator(mode="after")
    def _fits_the_variant(self) -> GradientCheckpointingSection:
        if self.use_reentrant and "determinism_check" in self.model_fields_set:
            raise InvalidValueError(
                "`determinism_check` has no effect with `use_reentrant: true`",
                fix="Remove it, or set `use_reentrant: false`.",
            )
        return self

    def torch_options(self) -> dict[str, Any]:
        """Return the keyword arguments for ``torch.utils.checkpoint.checkpoint``."""
        used = {"use_reentrant", "preserve_rng_state"}
        return self.model_dump(include=used if self.use_reentrant else used | {"determinism_check"})
