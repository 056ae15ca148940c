"""The spec key ``streaming``."""

from __future__ import annotations

from llmload import Section


class StreamingSection(Section):
    """How the streaming loader proves what it did."""

    digests: bool = False
    """Record SHA-256 of every weight as read and as placed. Reads every byte, also of weights that
    would stay on the file's pages, and takes a second or so per GB."""
