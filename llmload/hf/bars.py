"""The progress bars of transformers and of the hub, and what libraries log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hidden() -> Iterator[None]:
    """Show none of them in the block, and then again, unless they were off already."""
    from transformers.utils import logging as theirs

    if not theirs.is_progress_bar_enabled():
        yield
        return
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.enable_progress_bar()


@contextmanager
def muted(name: str) -> Iterator[None]:
    """Let a library's logger say nothing but errors in the block."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
