"""The README does what it says: its snippet runs, and the table has every key."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from llmload.testing import tiny_checkpoint
from llmload_fsdp.section import ParallelSection

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "fsdp.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_snippets_print_what_stands_under_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path / "sft", "llama")
    snippets = [text for kind, text in BLOCKS if kind == "python"]
    outputs = [text for kind, text in BLOCKS if kind == "text"]
    assert len(snippets) == len(outputs) == 1
    for snippet, expected in zip(snippets, outputs, strict=True):
        with redirect_stdout(StringIO()) as printed:
            exec(compile(snippet, "README.md", "exec"), {})
        assert printed.getvalue() == expected


def test_the_table_lists_every_key_of_the_section() -> None:
    table = README.partition("## The section")[2].partition("## ")[0]
    listed = {
        key
        for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
        for key in re.findall(r"`(\w+)`", row)
    }
    assert listed == set(ParallelSection.model_fields)


@pytest.mark.skipif(not PAGE.is_file(), reason="the page is in the repository alone")
@pytest.mark.filterwarnings("ignore")
def test_the_page_of_the_documentation_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the core's tests run its other pages."""
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    from snippets import run

    tiny_checkpoint(tmp_path / "demo" / "model", "llama")
    run(PAGE, tmp_path)
