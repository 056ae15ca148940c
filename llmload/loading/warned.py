"""Warnings, said to whoever listens: to the logger ``llmload``, which without any setup writes to
standard error."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

from llmload.errors import Problem
from llmload.loading.report import Report

_LOGGER = logging.getLogger("llmload")


def say(warnings: Iterable[Problem | str]) -> None:
    """Log warnings; of several ranks the first does so for all, the others at level INFO."""
    first = os.environ.get("RANK", "0") == "0"
    for warning in warnings:
        _LOGGER.log(logging.WARNING if first else logging.INFO, "%s", warning)


def say_rest(report: Report, planned: Iterable[Problem], member: str = "") -> None:
    """Log the warnings of a load that its plan did not have.

    :param member: of a group, whose plan's warnings were said with its name.
    """
    known = set(map(str, planned))
    begin = f"models.{member}: " if member else ""
    say(f"{begin}{text}" for text in report.warnings if text not in known)
