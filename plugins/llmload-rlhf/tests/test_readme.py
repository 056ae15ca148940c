"""The README does what it says: its snippets run, and print what stands under them."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from making import needs_safe_pickles

from llmload.testing import tiny_checkpoint
from llmload_rlhf.plugins import CriticHeadPlugin, RewardHeadPlugin, ValueHeadPlugin

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@needs_safe_pickles
def test_the_snippets_print_what_stands_under_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path / "sft", "llama")
    snippets = [text for kind, text in BLOCKS if kind == "python"]
    outputs = [text for kind, text in BLOCKS if kind == "text"]
    assert len(snippets) == len(outputs) == 2
    names: dict[str, object] = {}
    for snippet, expected in zip(snippets, outputs, strict=True):
        with redirect_stdout(StringIO()) as printed:
            exec(compile(snippet, "README.md", "exec"), names)
        assert printed.getvalue() == expected


def test_the_table_lists_every_layout() -> None:
    rows = re.findall(r"^\| (`\w+`|) *\| `(\w+)` \|", README, re.MULTILINE)
    listed, section = set(), ""
    for name, layout in rows:
        section = name.strip("`") or section
        listed.add((section, layout))
    plugins = (CriticHeadPlugin, RewardHeadPlugin, ValueHeadPlugin)
    wrapped = {(plugin.name, layout) for plugin in plugins for layout in plugin.layouts}
    assert listed == wrapped | {("reward_head", "sequence_classification")}
