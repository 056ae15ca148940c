"""What a command needs of its surroundings: standard streams, and a folder for what passes."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from llmload.errors import LlmloadError, RequestError

_GREETINGS: Final = {
    "DeepSpeed": "Setting accelerator to CPU.",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}
"""Logger of a library -> how begins what it says when it is imported where there is no accelerator,
whatever is asked of it."""


def open_closed_streams() -> None:
    """Open the null device for each standard stream that is closed.

    Otherwise a file that is opened later gets the stream's number, and whatever a library prints
    lands in it.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - stays


@contextmanager
def written_or_told() -> Iterator[None]:
    """End with a message where what is written in this block cannot be.

    :raises SystemExit: of exit code 1, after the message.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # nobody reads on, and typer ends in silence
        sys.stderr.write(f"standard output cannot be written: {error.strerror}\n")
        raise SystemExit(LlmloadError.exit_code) from None


@contextmanager
def temporary_folder_told() -> Iterator[None]:
    """Say what to do where no temporary folder can be written to.

    Libraries look for one when they are imported: dill does, which torch imports where it is there.

    :raises RequestError: there is none, and something asked for one.
    """
    try:
        yield
    except FileNotFoundError as error:
        import tempfile

        try:
            tempfile.gettempdir()
        except FileNotFoundError:
            raise RequestError(
                f"{error.strerror}, and a library that this needs wants one",
                fix="Set TMPDIR to a folder that can be written to, /dev/shm for instance.",
            ) from error
        raise


@contextmanager
def greetings_unsaid() -> Iterator[None]:
    """Drop in the block what libraries say of themselves when they are imported."""

    def says_something(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_GREETINGS[record.name])

    loggers = [logging.getLogger(name) for name in _GREETINGS]
    for logger in loggers:
        logger.addFilter(says_something)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(says_something)
