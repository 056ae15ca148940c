"""torch's own settings, for as long as something is built."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class default_dtype(AbstractContextManager[None]):  # noqa: N801 - reads as a function
    """Set torch's default dtype and restore it, whatever happens."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        import torch

        self._before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *exc: object) -> None:
        import torch

        torch.set_default_dtype(self._before)
