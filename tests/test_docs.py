"""What the documents say of the code is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROMISED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())


def test_security_promises_are_found() -> None:
    assert len(PROMISED) > 10


@pytest.mark.parametrize(("file", "test"), PROMISED, ids=[test for _, test in PROMISED])
def test_every_promise_names_a_test_that_exists(file: str, test: str) -> None:
    assert f"\ndef {test}(" in (ROOT / file).read_text()
