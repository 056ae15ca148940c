"""The commands, and how plans, reports and problems are shown.

In come words of the command line; data goes to standard output, everything for people to standard
error.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmload.cli.commands import app as app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line and exit: 130 after Ctrl-C, 143 after SIGTERM."""
    from llmload.cli.stopping import stoppable

    with stoppable():  # before anything is imported that takes a moment
        from llmload.cli.streams import open_closed_streams, written_or_told

        open_closed_streams()
        from llmload.cli.commands import app

        # Commands say so themselves of their answers.
        with written_or_told() if {"-h", "--help"} & {*sys.argv} else nullcontext():
            app()


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name != "app":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from llmload.cli.commands import app

        return app
