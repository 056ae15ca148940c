"""Every causal model type comes out of a lazy build and streaming as out of ``from_pretrained``."""

from __future__ import annotations

import shutil
from pathlib import Path

import architectures
import pytest
from sameness import differences, from_pretrained
from tiny import save_checkpoint

import llmload
from llmload import compat
from llmload.errors import RequestError

pytest.importorskip("colossalai")

IS_MODERN = compat.major("transformers") >= 5

_SLICES = (
    "its constructor slices a tensor, which LazyInitContext gives memory for at once, and computes"
    " with it and one that has none, which torch 2.13 refuses"
)
NOT_LAZY = {"codegen": _SLICES, "gptj": _SLICES, "minimax": _SLICES} if IS_MODERN else {}
"""Types that ``LazyInitContext`` cannot build, with the reason."""

NOT_SAVED = {} if IS_MODERN else {"zamba2": "4.51.3 cannot save its shared blocks as safetensors"}
"""Types of which no folder can be made, with the reason."""

BUILT = [name for name in architectures.causal_lm_types() if name not in NOT_LAZY | NOT_SAVED]


@pytest.fixture(scope="module")
def registry() -> llmload.Registry:
    return llmload.create_registry()


@pytest.mark.parametrize("model_type", BUILT)
def test_an_architecture_is_bit_equal_after_a_lazy_build(
    model_type: str, tmp_path: Path, registry: llmload.Registry
) -> None:
    folder = save_checkpoint(architectures.build("causal_lm", model_type), tmp_path / "model")
    for dtype in ("float32", "bfloat16"):
        spec = {"model": str(folder), "dtype": dtype, "colossalai": {}}
        result = llmload.load(spec, registry=registry, prove=False)
        theirs = from_pretrained(architectures.AUTO_CLASSES["causal_lm"], folder, dtype=dtype)
        assert differences(result.model, theirs) == []
        assert result.report.loader == "streaming"
    shutil.rmtree(folder)


def test_nearly_every_architecture_is_built_lazily() -> None:
    assert len(BUILT) >= (170 if IS_MODERN else 90)


@pytest.mark.parametrize("model_type", NOT_LAZY)
def test_an_excluded_architecture_is_refused_and_not_half_built(
    model_type: str, tmp_path: Path, registry: llmload.Registry
) -> None:
    folder = save_checkpoint(architectures.build("causal_lm", model_type), tmp_path / "model")
    with pytest.raises(RequestError, match="cannot be built under LazyInitContext"):
        llmload.load({"model": str(folder), "colossalai": {}}, registry=registry)
