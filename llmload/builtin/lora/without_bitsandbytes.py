"""PEFT without bitsandbytes, for as long as nobody else has imported that.

PEFT imports bitsandbytes when it is imported itself, since 0.21, and when it wraps a layer, to ask
whether it is one of those. That takes over a second, for torch's inductor above all. Only who has
imported bitsandbytes can have made a layer of it, so that until then the answer is known.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Final

_BITSANDBYTES: Final = "bitsandbytes"
_ASKING: Final = ("is_bnb_available", "is_bnb_4bit_available")


class _OnUse(ModuleType):
    """Stands for a module until it is used, from several threads too.

    Python's own ``LazyLoader`` shows a half-made module to the second thread (before 3.12.3).
    """

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


def import_peft() -> None:
    """Import PEFT, and have the bitsandbytes that it imports be imported at its first use."""
    found = None
    if _BITSANDBYTES not in sys.modules and "peft" not in sys.modules:
        found = find_spec(_BITSANDBYTES)
    if found is None:
        import_module("peft")
        return
    stand_in = _OnUse(_BITSANDBYTES)
    stand_in.__spec__ = found  # by which others ask whether it is installed
    sys.modules[_BITSANDBYTES] = stand_in
    try:
        import_module("peft")
    finally:
        if sys.modules.get(_BITSANDBYTES) is stand_in:
            del sys.modules[_BITSANDBYTES]


def _once_imported(ask: Callable[[], bool]) -> bool:
    return _BITSANDBYTES in sys.modules and ask()


@contextmanager
def asked_once_imported() -> Iterator[None]:
    """Have PEFT, as it wraps layers, ask for those of bitsandbytes only once that is imported."""
    from peft.tuners.lora import model

    asking = {name: getattr(model, name) for name in _ASKING}
    for name, ask in asking.items():
        setattr(model, name, partial(_once_imported, ask))
    try:
        yield
    finally:
        for name, ask in asking.items():
            setattr(model, name, ask)
