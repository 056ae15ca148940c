"""Fake distributions: folders that importlib.metadata takes for installed packages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class FakeDistributions:
    """Writes modules and their ``dist-info`` into a folder that is on ``sys.path``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(
        self,
        distribution: str,
        entry_points: dict[str, str],
        module: str = "",
        source: str = "",
        version: str = "1.0",
    ) -> None:
        """Install a distribution with entry points in the group ``llmload`` and one module."""
        info = self.root / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        lines = [f"{name} = {value}" for name, value in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[llmload]", *lines]) + "\n")
        if module:
            (self.root / f"{module}.py").write_text(source)


@contextmanager
def fake_distributions(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDistributions]:
    """Put an empty folder of distributions first on the path; forget its modules afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(root))
    try:
        yield FakeDistributions(root)
    finally:
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) and Path(
                sys.modules[name].__file__ or ""
            ).is_relative_to(root):
                del sys.modules[name]
