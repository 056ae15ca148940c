"""Fixtures for the tests of a plugin, there wherever llmload is installed.

They cost a run of pytest that does not use them nothing: neither torch nor transformers is imported
before a fixture needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from llmload.testing.distributions import FakeDistributions


@pytest.fixture(scope="session")
def llmload_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make tiny checkpoint folders: ``llmload_checkpoint("gpt2", pad=True)`` returns a folder.

    Arguments are those of :func:`llmload.testing.tiny_checkpoint`. Each call makes a new folder, so
    that a test may write to it.
    """

    def make(model_type: str = "llama", **options: Any) -> Path:
        from llmload.testing import tiny_checkpoint

        return tiny_checkpoint(tmp_path_factory.mktemp(model_type), model_type, **options)

    return make


@pytest.fixture
def llmload_distributions(tmp_path: Path) -> Iterator[FakeDistributions]:
    """A place for fake distributions, on ``sys.path`` for the length of one test."""
    from llmload.testing import fake_distributions

    root = tmp_path / "site"
    root.mkdir()
    with fake_distributions(root) as fakes:
        yield fakes


@pytest.fixture
def llmload_nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves global state changed: dtypes, patches, threads, files, environment.

    For tests of loads: ``@pytest.mark.usefixtures("llmload_nothing_left_behind")``.
    """
    from llmload.testing import nothing_left_behind

    with nothing_left_behind():
        yield
