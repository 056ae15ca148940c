"""Trainer, accelerate and TRL train a model of ours to the losses of their own path.

Each tool and each combination of sections once. With DeepSpeed: ``zero3/test_trainers.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tools

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tools.folders(tmp_path_factory.mktemp("tools"))


@pytest.mark.parametrize(("tool", "name"), tools.SOME)
def test_two_steps_give_the_losses_of_the_tools_own_path(
    tool: str, name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    tools.compare(tool, name, folders, tmp_path)
