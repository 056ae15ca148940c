"""The spec key ``embeddings``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from llmload.builtin.embeddings.spellings import SPELLINGS
from llmload.plugin import Section

InitNew = Literal["mean", "normal", "zero"]


class EmbeddingsSection(Section):
    """How large the input and output embeddings become, and what new rows hold.

    DeepSpeed-Chat's rule is ``{pad_to_multiple_of: 8, allow_shrink: true}``.
    """

    spellings = SPELLINGS

    pad_to_multiple_of: Annotated[int, Field(ge=1, le=2**20)] | None = None
    """Round the number of rows up to a multiple of this; 8, 64 or 128 suit tensor cores."""
    init_new: InitNew = "mean"
    """New rows: ``mean`` of the rows of the tokens that the model knows; ``normal``, drawn for each
    column with their mean and standard deviation; or ``zero``."""
    allow_shrink: bool = False
    """Cut rows that no token uses. Many checkpoints have them; without this they are kept."""
    seed: int = 0
    """For ``normal``: every process draws the same rows, whatever its own random state."""
