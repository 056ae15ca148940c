"""Trainer, accelerate and TRL train a model of ours to the losses of their own path.

Each tool and some combinations of sections; every tool with every combination: ``nox -s tools``.
With DeepSpeed: ``zero3/test_trainers.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tools import SOME, called, compare, small_folders

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return small_folders(tmp_path_factory.mktemp("tools"))


@pytest.mark.parametrize(
    ("tool", "names"), [pytest.param(tool, n, id=f"{tool}-{called(n)}") for tool, n in SOME]
)
def test_two_steps_give_the_losses_of_the_tools_own_path(
    tool: str, names: tuple[str, ...], folders: dict[str, Path], tmp_path: Path
) -> None:
    compare(tool, names, folders, tmp_path)
