"""Every model type comes out of a lazy build and streaming as out of ``from_pretrained``."""

from __future__ import annotations

import shutil
from pathlib import Path

import architectures
import pytest
from sameness import differences, from_pretrained
from stacks import IS_MODERN

import llmload
from llmload.errors import RequestError
from llmload.testing import save_checkpoint

pytest.importorskip("colossalai")

_SLICES = (
    "its constructor slices a tensor, which LazyInitContext gives memory for at once, and computes"
    " with it and one that has none, which torch 2.13 refuses"
)
NOT_LAZY = (
    {
        ("causal_lm", "codegen"): _SLICES,
        ("causal_lm", "gptj"): _SLICES,
        ("causal_lm", "minimax"): _SLICES,
        ("seq2seq_lm", "nemo_speechlm"): _SLICES,
        ("base", "llama4"): _SLICES,
    }
    if IS_MODERN
    else {
        ("base", "nezha"): "its constructor writes a table entry by entry, and LazyInitContext"
        " replays each write one level of recursion deeper"
    }
)
"""Types that ``LazyInitContext`` cannot build, with the reason."""

BUILT = [pair for pair in architectures.tried() if pair not in NOT_LAZY]


@pytest.fixture(scope="module")
def registry() -> llmload.Registry:
    return llmload.create_registry()


@pytest.mark.parametrize(("kind", "model_type"), BUILT)
def test_an_architecture_is_bit_equal_after_a_lazy_build(
    kind: str, model_type: str, tmp_path: Path, registry: llmload.Registry
) -> None:
    folder = save_checkpoint(architectures.build(kind, model_type), tmp_path / "model")
    for dtype in ("float32", "bfloat16"):
        spec = {"model": str(folder), "auto_class": kind, "dtype": dtype, "colossalai": {}}
        result = llmload.load(spec, registry=registry, prove=False)
        theirs = from_pretrained(architectures.AUTO_CLASSES[kind], folder, dtype=dtype)
        assert differences(result.model, theirs) == []
        assert result.report.loader == "streaming"
    shutil.rmtree(folder)


@pytest.mark.refused_late  # only building it under LazyInitContext tells, which a plan does not do
@pytest.mark.parametrize(("kind", "model_type"), NOT_LAZY)
def test_an_excluded_architecture_is_refused_and_not_half_built(
    kind: str, model_type: str, tmp_path: Path, registry: llmload.Registry
) -> None:
    folder = save_checkpoint(architectures.build(kind, model_type), tmp_path / "model")
    spec = {"model": str(folder), "auto_class": kind, "colossalai": {}}
    with pytest.raises(RequestError, match="cannot be built under LazyInitContext"):
        llmload.load(spec, registry=registry)
