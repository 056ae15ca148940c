"""What the documents say of the code is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in (
        "*.md",
        "benchmarks/**/*.md",
        "docs/**/*.md",
        "examples/**/*.md",
        "plugins/*/*.md",
    )
    for path in ROOT.glob(pattern)
)
PROMISED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())


def test_security_promises_are_found() -> None:
    assert len(PROMISED) > 10


@pytest.mark.parametrize(("file", "test"), PROMISED, ids=[test for _, test in PROMISED])
def test_every_promise_names_a_test_that_exists(file: str, test: str) -> None:
    assert f"\ndef {test}(" in (ROOT / file).read_text()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_to_a_file(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = re.findall(
        r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    )
    place = (ROOT / document).parent
    missing = [t for t in targets if "://" not in t and not (place / t).exists()]
    assert missing == []


def test_the_architecture_has_the_floors_of_the_contract() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d \| ([^|]+) \|", text, re.MULTILINE)
    (layers,) = re.findall(
        r"^layers = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    contract = [line.split(" | ") for line in re.findall(r'"([^"]+)"', layers)]
    assert [re.findall(r"`(\w+)`", row) for row in rows] == contract
