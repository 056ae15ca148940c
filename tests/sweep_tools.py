"""Every tool with every combination of sections that goes together: ``nox -s tools``.

The losses of two steps, and every parameter after them, are those of the tool's own path.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tools import TOOLS, allowed, called, compare, small_folders

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return small_folders(tmp_path_factory.mktemp("tools"))


@pytest.mark.parametrize("names", allowed(), ids=called)
@pytest.mark.parametrize("tool", TOOLS)
def test_two_steps_give_the_losses_of_the_tools_own_path(
    tool: str, names: tuple[str, ...], folders: dict[str, Path], tmp_path: Path
) -> None:
    compare(tool, names, folders, tmp_path)
