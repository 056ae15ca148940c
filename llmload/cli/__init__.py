"""The commands, and how plans, reports and problems are shown.

In come words of the command line; data goes to standard output, everything for people to standard
error.
"""

from llmload.cli.commands import app, main

__all__ = ["app", "main"]
