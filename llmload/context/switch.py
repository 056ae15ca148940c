"""What a plugin tells of an adapter of its own, so that its model can be used without it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn


class AdapterSwitch(Protocol):
    """Turns off the adapter of one model, for as long as another member of a group is asked."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the adapter's own parameters."""

    def off(self) -> AbstractContextManager[Any]:
        """Return a context in which the model computes as its base does.

        What it switches is as it was afterwards; gradients and train mode are not its affair.
        """
