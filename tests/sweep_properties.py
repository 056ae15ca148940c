"""Every architecture has the properties of ``properties.py``, on this stack and on two ranks.

Run by ``nox -s properties`` and ``nox -s properties_colossalai``, not with the other tests.
"""

from __future__ import annotations

from pathlib import Path

import properties
import pytest
from test_properties import split_faults

PARTS = 12


@pytest.mark.parametrize(("kind", "model_type"), properties.TYPES)
@pytest.mark.parametrize("name", properties.PROPERTIES)
@pytest.mark.refused_late  # a model that cannot run, and what the property itself looks for
def test_an_architecture_has_the_property(
    name: str, kind: str, model_type: str, tmp_path: Path
) -> None:
    assert properties.faults(name, kind, model_type, tmp_path) == []


@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_tensor_is_accounted_for_on_two_ranks(part: int, tmp_path: Path) -> None:
    assert split_faults(properties.TYPES[part::PARTS], tmp_path, timeout=800) == []
