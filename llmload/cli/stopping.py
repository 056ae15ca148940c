"""Ctrl-C, SIGTERM and SIGHUP end a command soon, in silence, with nothing left behind.

Python raises ``KeyboardInterrupt`` wherever it happens to be. While a library is imported, that may
be below its C++, which aborts, or within an ``except`` that takes it for an optional part that is
not there; in a destructor it is printed and forgotten. So here the exception waits while something
is imported, though not for long, and comes again where nothing came of it. Once it is on its way,
further signals wait for what is being tidied up.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import ExtensionFileLoader
from types import FrameType
from typing import Any, Final

_SIGNALS: Final = ("SIGINT", "SIGTERM", "SIGHUP")
_LOOK: Final = 0.05
"""Seconds between two looks at what the process is at."""
_IMPORT: Final = 1.0
"""Seconds that an import may still go on; the start of a C library, until it is done."""
_TIDYING: Final = 5.0
"""Seconds after which another signal ends the process where it stands."""
_LEAVING: Final = 0.5
"""Seconds that libraries may take to leave, once what was under way is tidied up."""


class _Stop:
    """The first signal that came."""

    def __init__(self) -> None:
        self.exit_code = 0
        self._asked_at = 0.0

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if not self.exit_code:
            self.exit_code, self._asked_at = 128 + number, time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, _LOOK, _LOOK)
            self.look(number, frame)
        elif time.monotonic() - self._asked_at > _TIDYING:
            os._exit(self.exit_code)

    def look(self, _: int, frame: FrameType | None) -> None:
        """Raise the exception, unless it is on its way or would do harm here."""
        if not _is_handled() and not self._is_importing(frame):
            signal.default_int_handler(signal.SIGINT, frame)

    @staticmethod
    def forget(unraisable: Any) -> None:
        """Stand for ``sys.unraisablehook``: what cannot be raised in a destructor comes again."""
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(unraisable)

    def _is_importing(self, frame: FrameType | None) -> bool:
        late = time.monotonic() - self._asked_at > _IMPORT
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib") and (
                not late or isinstance(frame.f_locals.get("self"), ExtensionFileLoader)
            ):
                return True
            frame = frame.f_back
        return False


def _is_handled() -> bool:
    """Say whether this is called while a ``finally``, ``except`` or ``__exit__`` tidies up."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


@contextmanager
def stoppable() -> Iterator[None]:
    """End the process after the block: 128 and the number of the signal that came, if one did.

    A signal that the process was started to ignore, as below ``nohup``, is ignored. An error that
    is not ``SystemExit`` is left to the interpreter.
    """
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return
    stop, code = _Stop(), 0
    for name in _SIGNALS:
        number = getattr(signal, name)
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop.ask)
    signal.signal(signal.SIGALRM, stop.look)
    sys.unraisablehook = stop.forget
    try:
        yield
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if stop.exit_code:
        # torch 2.5 waits here for processes that compile, which end with this one anyway.
        signal.signal(signal.SIGALRM, lambda number, frame: os._exit(stop.exit_code))
        signal.setitimer(signal.ITIMER_REAL, _LEAVING)
    _end(stop.exit_code or code)


def _end(exit_code: int) -> None:
    """End without taking the interpreter down, which takes a second with torch in it.

    Libraries that stopped half-way may abort there, and a signal that comes then leaves what they
    would have removed.
    """
    with suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BaseException):
            stream.flush()
    os._exit(exit_code)
