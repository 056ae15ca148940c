"""The README does what it says: its snippets run, and give the output that stands under them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from stacks import IS_MODERN

from llmload import create_registry
from llmload.cli import demo
from llmload.spec import files

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^    (python3 .*)$", README, re.MULTILINE)

modern_output = pytest.mark.skipif(
    not IS_MODERN, reason="the README shows the classes of the modern stack"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which a demo was kept."""
    place = tmp_path_factory.mktemp("readme")
    before = Path.cwd()
    os.chdir(place)
    try:
        demo.run(
            Path("demo"),
            steps=5,
            registry=create_registry(),
            track=lambda items, description: items,
        )
    finally:
        os.chdir(before)
    return place


def blocks(kind: str) -> list[str]:
    return [text for name, text in BLOCKS if name == kind]


def stripped(text: str) -> str:
    """Leave out trailing spaces, with which rich fills its tables."""
    return "\n".join(line.rstrip() for line in text.splitlines())


def test_there_are_two_commands_and_ci_runs_the_second() -> None:
    assert len(COMMANDS) == 2
    assert COMMANDS[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_spec_is_the_demos(place: Path) -> None:
    (spec,) = blocks("yaml")
    assert (place / "demo" / "demo.yaml").read_text() == spec
    assert create_registry().validate(files.parse(spec)).sections.keys() >= {"lora"}


@modern_output
@pytest.mark.parametrize("block", blocks("console"), ids=lambda block: block.splitlines()[0])
def test_a_command_writes_what_stands_under_it(block: str, place: Path) -> None:
    command, _, expected = block.partition("\n")
    program = f"{shlex.quote(sys.executable)} -c 'from llmload.cli import main; main()'"
    command = re.sub(r"\bllmload (?=load|plan)", f"{program} ".replace("\\", r"\\"), command[2:])
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "100"},
    )
    shown = done.stdout or done.stderr.splitlines()[-1]
    assert stripped(shown).strip("\n") == stripped(expected).strip("\n")


@modern_output
def test_the_python_snippets_print_what_stands_under_them(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    snippets, outputs = blocks("python"), blocks("text")
    assert len(snippets) == len(outputs) == 3
    names: dict[str, object] = {}
    for snippet, expected in zip(snippets, outputs, strict=True):
        with redirect_stdout(StringIO()) as printed:
            exec(compile(snippet, "README.md", "exec"), names)
        assert printed.getvalue() == expected
