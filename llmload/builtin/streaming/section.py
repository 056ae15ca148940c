"""The spec key ``streaming``."""

from __future__ import annotations

from typing import Literal

from llmload.plugin import Section


class StreamingSection(Section):
    """Where the streaming loader leaves weights, and how it proves what it did."""

    mapped: bool = True
    """Leave weights that need no cast on the pages of their files, which costs neither time nor
    memory. They then follow the file where it is overwritten in place, and the process ends where
    it is cut off: ``false`` copies them into memory of their own."""

    reading: Literal["auto", "mapped", "ahead", "read"] = "auto"
    """How bytes come from the files. ``mapped``: as pages are touched, which is best where they are
    in memory already. ``ahead``: threads have the kernel fetch what this process will read, and
    nothing else, before it is used. ``read``: threads read into memory of the process's own; no
    weight stays on pages then. ``auto`` takes what suits: ``mapped`` for files in memory, ``read``
    where a file system cannot map, else ``ahead``."""

    fetch: Literal["whole", "spans"] = "whole"
    """What comes of weights that are on the hub and not here. ``whole``: the files. ``spans``: the
    bytes that are read, by range requests; under ZeRO-3 a machine so fetches what its ranks keep.
    They lie beside the hub's cache, for all processes of the machine and for later loads. What is
    in a folder, or in the cache already, is read from there."""

    digests: bool = False
    """Record SHA-256 of every weight as read and as placed. Reads every byte, also of weights that
    would stay on the file's pages, and takes a second or so per GB."""

    @property
    def withholds(self) -> frozenset[str]:
        """What others cannot count on in this load."""
        return frozenset() if self.may_stay else frozenset({"mapped_pages"})

    @property
    def may_stay(self) -> bool:
        """Whether weights may stay on the pages of their files."""
        return self.mapped and self.reading != "read"
