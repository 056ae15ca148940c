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


@contextmanager
def collection_of_new_objects() -> Iterator[None]:
    """Search inside this context for cycles of what is made in it, and of nothing that was before.

    Once torch and transformers are imported, a search through everything takes longer than to load
    a model as it is stored. To leave out all of it would keep cycles that hold weights until the
    end. Whoever has frozen objects (:func:`gc.freeze`) has decided on it, and finds them so.
    """
    if not gc.isenabled() or gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
