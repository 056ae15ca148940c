"""The README does what it says: its snippets run, and give the output that stands under them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from snippets import ROOT, blocks, run
from stacks import IS_MODERN

README = ROOT / "README.md"
COMMANDS = re.findall(r"^    (python3 .*)$", README.read_text(encoding="utf-8"), re.MULTILINE)


def test_there_are_two_commands_and_ci_runs_the_second() -> None:
    assert len(COMMANDS) == 2
    assert COMMANDS[0].endswith("/llmload demo")
    assert COMMANDS[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_spec_is_the_demos(kept_demo: Path) -> None:
    (spec,) = (block.text for block in blocks(README.read_text()) if block.kind == "yaml")
    assert (kept_demo / "demo" / "demo.yaml").read_text() == spec


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not IS_MODERN, reason="the README shows the classes of the modern stack")
def test_every_snippet_runs_and_gives_what_stands_under_it(kept_demo: Path) -> None:
    run(README, kept_demo)
