"""The command ``convert``: another tool's config in, a spec out, and what is said of the rest."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmload.errors import RequestError
from llmload.saving.writing import refused, require_place
from llmload.spec import converting, files, yaml_write
from llmload.spec.converting import Conversion
from llmload.spec.foreign_keys import of_sections

if TYPE_CHECKING:
    from llmload.host.registry import Registry


def convert(file: str, tool: str | None, registry: Registry) -> Conversion:
    """Convert a file, or standard input.

    :raises SpecError: it cannot be read, or whose it is cannot be told.
    """
    if file == "-":
        document = files.parse(sys.stdin.buffer.read(files.MAX_BYTES + 1), "<stdin>")
    else:
        document = files.read(file)
    spellings = of_sections(registry.sections.values())
    return converting.convert(document, tool, spellings, registry.sections, registry.validate)


def spec_text(made: Conversion, file: str) -> str:
    """Return the spec as a file has it, with its origin at the top."""
    name = "standard input" if file == "-" else Path(file).name
    origin = f"# Converted by llmload from {name}, a config of {made.tool}."
    return f"{origin}\n{yaml_write.dump(made.spec).rstrip()}"


def write(text: str, to: Path) -> None:
    """Write a spec that is not there yet.

    :raises RequestError: the file is there, or cannot be written.
    """
    require_place(to)
    if to.exists():
        raise RequestError(
            f"the file {str(to)!r} is there, and nothing is written over", fix="Name a new file."
        )
    with refused(to):
        to.write_text(f"{text}\n", encoding="utf-8")


def explained(made: Conversion, to: Path | None) -> str:
    """Say in words what was carried, and what was not and why."""
    return "\n".join(_lines(made, to))


def _lines(made: Conversion, to: Path | None) -> Iterator[str]:
    told = sum(map(bool, made.carried.values()))
    target = f" to {to}" if to is not None else ""
    yield f"a config of {made.tool}: {told} keys carried{target}"
    for key, value in made.assumed.items():
        yield f"assumed: `{key}: {yaml_write.dump_inline(value)}`, as {made.tool} does"
    for left in made.not_carried:
        yield f"not carried: {left.key}: {left.why}"
    if made.training:
        yield f"for the trainer: {', '.join(made.training)}"
