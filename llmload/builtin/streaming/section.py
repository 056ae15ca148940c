"""The spec key ``streaming``."""

from __future__ import annotations

from llmload.plugin import Section


class StreamingSection(Section):
    """Where the streaming loader leaves weights, and how it proves what it did."""

    mapped: bool = True
    """Leave weights that need no cast on the pages of their files, which costs neither time nor
    memory. They then follow the file where it is overwritten in place, and the process ends where
    it is cut off: ``false`` copies them into memory of their own."""

    digests: bool = False
    """Record SHA-256 of every weight as read and as placed. Reads every byte, also of weights that
    would stay on the file's pages, and takes a second or so per GB."""

    @property
    def withholds(self) -> frozenset[str]:
        """What others cannot count on in this load."""
        return frozenset() if self.mapped else frozenset({"mapped_pages"})
