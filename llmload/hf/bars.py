"""The progress bars of transformers and of the hub, and what libraries log."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def track(items: Collection[T], description: str) -> Iterable[T]:
    """Return ``items`` again, one by one, and show where transformers shows its loops how many are
    done and left: in a terminal, in a notebook, in a command's own display, or nowhere.

    Of several ranks the first shows it for all.

    :param description: what is done, in a few words.
    """
    from transformers.utils import logging as theirs

    if not is_first_rank():
        return items
    bar: Iterable[T] = theirs.tqdm(items, desc=description)
    return bar


def is_first_rank() -> bool:
    """Whether this is the process that says for all how far they are."""
    return (os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0") == "0"


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
