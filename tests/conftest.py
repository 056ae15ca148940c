"""Fixtures that several test modules share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmload.testing import FakeDistributions, fake_distributions

# No test may reach for a hub, and progress bars have no place in captured output.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of all later searches for garbage, half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def distributions(tmp_path: Path) -> Iterator[FakeDistributions]:
    """A place for fake distributions, on ``sys.path`` for the length of one test."""
    root = tmp_path / "site"
    root.mkdir()
    with fake_distributions(root) as fakes:
        yield fakes
