"""Every public name and hook is listed with the version it came in, and no other name is."""

from __future__ import annotations

import re

import pytest
from snippets import ROOT

import llmload
from llmload import hookspecs, plugin, testing
from llmload.builtin.lora.hooks import Hooks

PAGE = (ROOT / "docs" / "reference" / "versions.md").read_text(encoding="utf-8")
DECLARED = [name for name in vars(Hooks) if not name.startswith("_")]
PUBLIC = {
    "Hooks": {*hookspecs.HELPERS, *hookspecs.SPINE, *DECLARED},
    "llmload": {*llmload.__all__},
    "llmload.hookspecs": {"HELPERS", "SPINE", "STAGES", "hookimpl", "hookspec"},
    "llmload.plugin": {*plugin.__all__},
    "llmload.testing": {*testing.__all__},
}


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_listed_with_its_version(module: str) -> None:
    (section,) = re.findall(rf"^## {re.escape(module)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    rows = re.findall(r"^\| (\d+\.\d+\.\d+) \| (.*) \|$", section, re.MULTILINE)
    listed = [name for _, names in rows for name in re.findall(r"`(\w+)`", names)]
    # What is new belongs to the version that is being made, in the last row.
    assert sorted(listed) == sorted(PUBLIC[module])
