"""Documents that execute: a page's blocks run one after the other, and give what stands under them.

In the order of the page, in a folder in which a demo was kept:

- ``yaml`` is checked as a spec or group, and written to the file that its ``title`` names. With
  ``data-of`` it is another tool's file and only has to be YAML.
- ``python`` runs, all blocks of a page in one namespace; what it prints stands in the ``text``
  block after it. With a ``title`` it is written to that file instead.
- ``console`` has commands after ``$``, each with its output, or the end of what it says on
  standard error where it has none.
- ``bash``, ``toml``, ``json`` and ``text`` elsewhere are read by people only.

A block's line ``# file: NAME`` stands for that file, from the root of the repository. A line of the
output, or part of one, that differs from run to run is left out as ``...``, as in doctest.
"""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import yaml
from typer.testing import CliRunner

from llmload import create_registry
from llmload.cli import commands
from llmload.spec import files, groupspec

ROOT = Path(__file__).parent.parent
SHOWN_ONLY = ("bash", "toml", "json", "text")
COLUMNS = {"COLUMNS": "100"}
_LOGGED = r"^\[[\d-]+ [\d:,]+\] \[[A-Z]+\].*\n"
"""A line that DeepSpeed logs on standard output, once in a process."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what stands beside that, its line and its text."""

    kind: str
    options: dict[str, str]
    line: int
    text: str


def blocks(page: str) -> list[Block]:
    """Return a page's fenced blocks, included files in their place."""
    found = []
    for match in re.finditer(r"^```(\w+)(.*)\n((?s:.*?))^```$", page, re.MULTILINE):
        options = dict(re.findall(r'([\w-]+)="([^"]*)"', match[2]))
        line = page.count("\n", 0, match.start()) + 1
        text = re.sub(r"^# file: (\S+)\n", lambda m: _read(m[1]), match[3], flags=re.MULTILINE)
        found.append(Block(match[1], options, line, text))
    return found


def run(document: Path, place: Path) -> None:
    """Run every block of a document with ``place`` as the working directory.

    :raises AssertionError: a block failed or gave something else; it says which.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    page = blocks(document.read_text(encoding="utf-8"))
    following = [*page, Block("", {}, 0, "")][1:]
    before = Path.cwd()
    os.chdir(place)
    try:
        for block, after in zip(page, following, strict=True):
            where = f"{document.name}, line {block.line}"
            if title := block.options.get("title"):
                (place / title).parent.mkdir(parents=True, exist_ok=True)
                (place / title).write_text(block.text, encoding="utf-8")
            if block.kind == "yaml":
                _check(block)
            elif block.kind == "python" and not title:
                expected = after.text if after.kind == "text" else ""
                _same(_printed(block.text, where, names), expected, where)
            elif block.kind == "console":
                for command, expected in _commands(block.text):
                    found = _said(command, place, lines=expected.count("\n"))
                    _same(found, expected, f"{where}: {command}")
            else:
                assert title or block.kind in SHOWN_ONLY, f"{where}: what is {block.kind!r}?"
    finally:
        os.chdir(before)


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _check(block: Block) -> None:
    if "data-of" in block.options:
        yaml.safe_load(block.text)
        return
    document = files.parse(block.text, block.options.get("title", "<page>"))
    registry = create_registry()
    if groupspec.is_group(document.data):
        registry.validate_group(document)
    else:
        registry.validate(document)


def _printed(code: str, where: str, names: dict[str, object]) -> str:
    with redirect_stdout(StringIO()) as printed, redirect_stderr(StringIO()):
        exec(compile(code, where, "exec"), names)
    return re.sub(_LOGGED, "", printed.getvalue(), flags=re.MULTILINE)


def _commands(text: str) -> Iterator[tuple[str, str]]:
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        yield command, expected


def _said(command: str, place: Path, *, lines: int) -> str:
    words = shlex.split(command)
    if words[0] == "llmload" and not {"|", ">", "&&"} & set(words):
        result = CliRunner().invoke(commands.app, words[1:], env=COLUMNS)
        return result.stdout or _last(result.stderr, lines)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | COLUMNS | {"PATH": path},
        timeout=250,
    )
    return done.stdout or _last(done.stderr, lines)


def _last(text: str, lines: int) -> str:
    """Return the end of a text: what libraries log while they are imported stands before it."""
    return "".join(text.splitlines(keepends=True)[-lines:]) if lines else ""


def _same(found: str, expected: str, where: str) -> None:
    found, expected = _without_edges(found), _without_edges(expected)
    matches = doctest.OutputChecker().check_output(expected, found, doctest.ELLIPSIS)
    assert matches, f"{where}\n--- expected\n{expected}--- found\n{found}"


def _without_edges(text: str) -> str:
    """Leave out empty lines around a text, and the spaces with which rich fills its tables."""
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n") + "\n"
