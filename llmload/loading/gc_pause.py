"""Python's search for garbage in cycles, held back where there is none."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Do not search for unreachable cycles inside this context.

    Importing torch and transformers makes some million objects that all stay, and Python looks
    through them again and again as they grow: a fifth of the time from `import` to a loaded model.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
