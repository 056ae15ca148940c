"""The spec key ``npy_folder``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

import llmload


class NpyFolderSection(llmload.Section):
    """Weights that lie as one file of NumPy's format for each tensor, ``NAME.npy``."""

    folder: Annotated[str, Field(min_length=1)] = "weights"
    """Where they lie, below the model's folder or below `weights_from`."""
