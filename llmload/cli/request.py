"""What a command was asked for: a spec file, standard input or a model, and values set beside it.

Everything else of the command line is in :mod:`llmload.cli.commands`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llmload.errors import SpecError
from llmload.spec import files, groupspec, other_files, yaml_read
from llmload.spec.document import Document
from llmload.spec.refusals import is_secret

if TYPE_CHECKING:
    from llmload.host.registry import Registry
    from llmload.spec.groupspec import GroupSpec
    from llmload.spec.loadspec import LoadSpec

_HUB_ID: Final = r"[\w-][\w.-]*/[\w-][\w.-]*"


def wanted(request: str, settings: Iterable[str], registry: Registry) -> LoadSpec | GroupSpec:
    """Read and check what the command line names: a group if it has the key ``models``.

    :param request: a spec file, ``-`` for standard input, the folder of a model or a hub id.
    :param settings: ``key=value``, each in place of what the spec says.
    :raises SpecError: with every fault at once.
    """
    asked = document(request)
    for setting in settings:
        asked = with_setting(asked, setting)
    if groupspec.is_group(asked.data):
        return registry.validate_group(asked)
    return registry.validate(asked)


def document(request: str) -> Document:
    """Read the spec that is named, or make one of nothing but the model that is."""
    if request == "-":
        return files.parse(sys.stdin.buffer.read(files.MAX_BYTES + 1), "<stdin>")
    if _is_model(request):
        return Document(data={"model": request})
    return files.read(request)


def _is_model(request: str) -> bool:
    if "\0" in request:
        return False
    try:
        if Path(request).exists():
            return Path(request).is_dir()
    except OSError:  # such as a name that is too long
        return False
    return re.fullmatch(_HUB_ID, request) is not None and not request.endswith(other_files.ENDINGS)


def with_setting(asked: Document, setting: str) -> Document:
    """Put the value of ``key.key=value``, which is YAML, in place of what the spec says."""
    keys, equals, text = setting.partition("=")
    said_by = f"--set {keys}=..." if is_secret((keys,), text) else f"--set {setting}"
    if not equals or not all(keys.split(".")):
        message = f"{setting!r} sets nothing"
        fix = "Write the key, `=` and the value: `--set lora.r=8`."
        raise SpecError(message, fix=fix, file="--set")
    value = yaml_read.parse(text, said_by)[0] if text.strip() else None
    return asked.with_value(tuple(keys.split(".")), value, said_by)
