"""The sound folder that the hostile ones are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from published import make_sound


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sound(tmp_path_factory.mktemp("sound"))
