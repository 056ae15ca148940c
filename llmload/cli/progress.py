"""One progress display: our loops and transformers' bars in the same place, or none at all.

Off where standard error is no terminal, for JSON, with ``--quiet``, on every rank but the first,
and where the hub's variable says so; then the bars of transformers and of the hub are off too.
Otherwise the hub shows its own bars for downloads.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Final, Protocol, TypeVar

T = TypeVar("T")

_TRUE: Final = ("1", "ON", "TRUE", "YES")
"""What the hub's library takes for true."""


class Track(Protocol):
    """Iterates, and shows how far it got."""

    def __call__(self, items: Iterable[T], description: str) -> Iterable[T]:
        """Return ``items`` again, one by one."""


def is_wanted(*, json: bool, environ: Mapping[str, str] = os.environ) -> bool:
    """Say whether somebody may be looking at standard error."""
    rank = environ.get("RANK") or environ.get("LOCAL_RANK") or "0"
    unwanted = environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in _TRUE
    return sys.stderr.isatty() and not json and rank == "0" and not unwanted and not is_quiet()


def is_quiet() -> bool:
    """Say whether a command was told to say nothing but its answer, and errors."""
    return not logging.getLogger("llmload").isEnabledFor(logging.WARNING)


def tell(items: Iterable[T], description: str) -> Iterator[T]:
    """Say on standard error how far a loop got, in a line for each quarter: no terminal is needed.

    :param items: of known length.
    """
    assert isinstance(items, Sized)
    total = len(items)
    quarters = {total * quarter // 4 for quarter in range(4)}
    for done, item in enumerate(items):
        if done in quarters:
            sys.stderr.write(f"{description}: {done} of {total}\n")
            sys.stderr.flush()
        yield item


@contextmanager
def progress(*, shown: bool) -> Iterator[Track]:
    """Take over progress bars for the length of a block, and give them back after it."""
    if not shown:
        with _no_bars():
            yield lambda items, description: items
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    display = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )

    def track(items: Iterable[T], description: str) -> Iterable[T]:
        # Started by the first loop, so that an empty display never meets the bar of a download.
        display.start()
        total = len(items) if isinstance(items, Sized) else None
        return display.track(items, total=total, description=description)

    try:
        with _transformers_bars(track):
            yield track
    finally:
        display.stop()


@contextmanager
def _transformers_bars(track: Track) -> Iterator[None]:
    """Show the loops of transformers through ``track``."""

    def bar(
        factory: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        if len(arguments) == 1 and options.keys() <= {"desc"}:
            return track(arguments[0], options.get("desc", ""))
        return factory(*arguments, **options)

    if find_spec("transformers") is None:
        yield
        return
    from transformers.utils import logging as theirs

    # transformers 4 has no such hook: its bars show themselves.
    if not hasattr(theirs, "set_tqdm_hook"):
        yield
        return
    before = theirs.set_tqdm_hook(bar)
    try:
        yield
    finally:
        theirs.set_tqdm_hook(before)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Silence the bars of transformers and the hub, where there are any."""
    if find_spec("transformers") is None:
        yield
        return
    from llmload.hf import bars

    with bars.hidden():
        yield
