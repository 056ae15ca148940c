"""The spec key ``cast``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from llmload.plugin import Dtype, Regex, Section


class CastSection(Section):
    """Mixed dtypes, such as normalisation layers in float32 in a bfloat16 model.

    A forward through them needs ``torch.autocast``, unless the model's own code casts.
    """

    modules: Annotated[Mapping[Regex, Dtype], Field(min_length=1, examples=[{"norm": "float32"}])]
    """Regular expression, found anywhere in a module's name -> dtype of the module and all in it.
    Where several are found, the first holds."""
