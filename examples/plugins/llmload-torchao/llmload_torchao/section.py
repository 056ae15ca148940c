"""The spec key ``torchao``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

import llmload


class TorchaoSection(llmload.Section):
    """Linear layers with weights in 8 bits by torchao, a scale for each row, the base frozen."""

    weights: Literal["int8", "float8"] = "int8"
    """What the weights are stored as; layers compute in the model's dtype."""
    skip_modules: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Modules that stay as they are: names, or how names end. The output head and what is tied to
    the embeddings stay so in any case."""
