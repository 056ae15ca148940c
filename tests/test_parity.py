"""docs/parity.md: its recipes are there, its snippet runs, and what it says to write is a spec."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import yaml
from recipes import EXAMPLES, ROOT

from llmload import create_registry
from llmload.spec.loadspec import LoadSpec
from llmload.testing import tiny_llama

PAGE = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
FRAGMENTS = [
    code
    for line in PAGE.splitlines()
    if line.startswith("| ")
    for code in re.findall(r"`(\w+: [^`]+)`", line.split(" | ")[-1])
    if not code.startswith("frozen_copy")  # of a group
]


def test_every_recipe_is_on_the_page() -> None:
    linked = re.findall(r"\(\.\./examples/([\w.]+)\)", PAGE)
    recipes = {file.name for file in EXAMPLES.glob("*.yaml") if "parity.md" in file.read_text()}
    assert sorted(linked) == sorted(recipes)
    assert len(recipes) == 12


def test_the_snippet_prints_what_stands_under_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path, name="model")
    (tmp_path / "examples").symlink_to(EXAMPLES)
    ((_, snippet), (_, expected)) = BLOCKS
    with redirect_stdout(StringIO()) as printed:
        exec(compile(snippet, "parity.md", "exec"), {})
    assert printed.getvalue() == expected


def test_there_are_fragments() -> None:
    assert len(FRAGMENTS) > 12


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_what_the_page_says_to_write_is_valid(fragment: str) -> None:
    keys = yaml.safe_load(fragment)
    registry = create_registry(environ={})
    spec = registry.validate({"model": "org/name", **keys})
    assert keys.keys() <= LoadSpec.model_fields.keys() | spec.sections.keys()
