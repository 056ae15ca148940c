"""A few architectures have the properties that all must have; ``sweep_properties.py`` asks all."""

from __future__ import annotations

from pathlib import Path

import architectures
import properties
import pytest
from zero3.farm import Job, launch


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "model_type"), properties.FEW)
@pytest.mark.parametrize("name", properties.PROPERTIES)
@pytest.mark.refused_late  # a model that cannot run, and what the property itself looks for
def test_an_architecture_has_the_property(
    name: str, kind: str, model_type: str, tmp_path: Path
) -> None:
    assert properties.faults(name, kind, model_type, tmp_path) == []


@pytest.mark.slow
def test_every_tensor_is_accounted_for_on_two_ranks(tmp_path: Path) -> None:
    # gemma3's parts are models, which transformers 4.51.3 partitions by themselves.
    types = [*properties.FEW, ("causal_lm", "gemma3")]
    assert split_faults(types, tmp_path, timeout=250) == []


def split_faults(types: list[tuple[str, str]], place: Path, timeout: float) -> list[str]:
    """List what is wrong with models that two ranks load under ZeRO-3."""
    cases = []
    for kind, model_type in types:
        folder = place / f"{kind}-{model_type}"
        architectures.build(kind, model_type).save_pretrained(folder)
        cases.append({"kind": kind, "model_type": model_type, "folder": str(folder)})
    job = Job("zero3.computing:every", {"cases": cases}, timeout=timeout)
    (ranks,) = launch([job], timeout=timeout + 30)
    found = []
    for rank in ranks:
        assert rank.code == 0, rank.output
        for case, faults in zip(types, rank.result, strict=True):
            found += [f"{' '.join(case)}: {fault}" for fault in faults]
    return found
