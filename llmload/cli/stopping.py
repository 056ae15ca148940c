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
_IMPORT: Final = 1.4
"""Seconds that an import may still go on; the start of a C library, until it is done."""
_ABORTS: Final = "torch"
"""Whose C++ calls Python while it is imported (pybind11), and aborts where that raises."""
_WRITERS: Final = ("llmload.saving", "llmload.checkpoint.kept", "llmload.cli.demo")
"""Who has something half written, and removes it when the exception comes."""
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
        if _is_handled():
            return
        below = [*_called_from(frame)]
        if any(found.f_code.co_filename.startswith("<frozen importlib") for found in below):
            if time.monotonic() - self._asked_at < _IMPORT:
                return
            modules = [str(found.f_globals.get("__name__")) for found in below]
            writing = any(name.startswith(_WRITERS) for name in modules)
            if not writing and any(name.partition(".")[0] == _ABORTS for name in modules):
                _leave(self.exit_code)
            if any(isinstance(found.f_locals.get("self"), ExtensionFileLoader) for found in below):
                return
        signal.default_int_handler(signal.SIGINT, frame)

    @staticmethod
    def forget(unraisable: Any) -> None:
        """Stand for ``sys.unraisablehook``: what cannot be raised in a destructor comes again."""
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(unraisable)


def _called_from(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame and each that it was called from."""
    while frame is not None:
        yield frame
        frame = frame.f_back


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
        _leave(stop.exit_code)
    _end(code)


def _leave(exit_code: int) -> None:
    """End soon: torch 2.5 waits for processes that compile, which end with this one anyway."""
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(exit_code))
    signal.setitimer(signal.ITIMER_REAL, _LEAVING)
    _end(exit_code)


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
