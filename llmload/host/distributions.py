"""Names and versions of installed distributions, without importing or fully parsing anything."""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib import metadata

STACK = (
    "llmload",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "bitsandbytes",
    "deepspeed",
    "colossalai",
)
"""What a report names, where it is installed."""


def name_and_version(distribution: metadata.Distribution) -> tuple[str, str]:
    """Return both from the first lines of the metadata.

    ``Distribution.version`` parses the whole file, long description and all: 3 ms for torch.
    """
    try:
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    except (OSError, UnicodeDecodeError):
        text = ""  # of a broken installation, which must not stop everybody else's
    header = text.partition("\n\n")[0]
    fields = dict(re.findall(r"^(Name|Version): *(.+?)\s*$", header, re.MULTILINE))
    return fields.get("Name", "unknown"), fields.get("Version", "unknown")


@cache
def version_of(distribution: str) -> str | None:
    """Return the installed version, or None."""
    try:
        return name_and_version(metadata.distribution(distribution))[1]
    except metadata.PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of what is installed of the stack."""
    found = {name: version for name in STACK if (version := version_of(name))}
    return {"python": sys.version.split()[0], **found}
