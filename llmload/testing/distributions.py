"""Fake distributions: folders that importlib.metadata takes for installed packages, without pip."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class FakeDistributions:
    """Writes modules and their ``dist-info`` into a folder that is on ``sys.path``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        """The folder. A process that has it in ``PYTHONPATH`` finds the distributions too."""

    def add(
        self,
        distribution: str,
        entry_points: Mapping[str, str],
        module: str = "",
        source: str = "",
        version: str = "1.0",
    ) -> None:
        """Install a distribution with entry points in the group ``llmload`` and one module.

        :param entry_points: name of the plugin -> ``module:attribute``.
        :param module: name of the module to write; empty for none.
        :param source: what is written to it.
        """
        info = self.root / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        lines = [f"{name} = {value}" for name, value in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[llmload]", *lines]) + "\n")
        if module:
            (self.root / f"{module}.py").write_text(source)
        importlib.invalidate_caches()


@contextmanager
def fake_distributions(root: Path) -> Iterator[FakeDistributions]:
    """Put an empty folder of distributions first on the path; forget its modules afterwards."""
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    try:
        yield FakeDistributions(root)
    finally:
        sys.path.remove(str(root))
        for name, module in list(sys.modules.copy().items()):
            file = getattr(module, "__file__", None)
            if file and Path(file).is_relative_to(root):
                del sys.modules[name]
        importlib.invalidate_caches()
