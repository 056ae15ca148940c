"""Every text architecture comes out of the streaming loader as it comes out of from_pretrained."""

from __future__ import annotations

from pathlib import Path

import architectures
import pytest
import torch
from sameness import differences, from_pretrained
from stacks import IS_MODERN

import llmload
from llmload.testing import save_checkpoint

CONVERTED = ("mixtral", "qwen2_moe", "qwen3_next", "jamba", "hrm_text")


@pytest.fixture(scope="module")
def registry() -> llmload.Registry:
    return llmload.create_registry()


def compare(
    folder: Path,
    kind: str,
    dtype: str,
    registry: llmload.Registry,
    *,
    strict: bool = True,
    seen_all: bool = True,
) -> llmload.LoadResult:
    """Load ``folder`` both ways from the same random state and hold the two together."""
    torch.manual_seed(0)
    spec = {"model": str(folder), "auto_class": kind, "dtype": dtype, "strict": strict}
    result = llmload.load(spec, registry=registry, prove=False)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    theirs = from_pretrained(architectures.AUTO_CLASSES[kind], folder, dtype=dtype)
    assert differences(result.model, theirs) == []
    assert torch.equal(after, torch.get_rng_state())
    assert result.report.loader == "streaming"
    files = result.report.facts["streaming"]["files"].values()
    assert all(file["bytes_read"] == file["tensor_bytes"] for file in files) or not seen_all
    return result


def both_folders(kind: str, model_type: str, tmp_path: Path) -> tuple[Path, Path]:
    model = architectures.build(kind, model_type)
    return save_checkpoint(model, tmp_path / "single"), save_checkpoint(
        model.bfloat16(), tmp_path / "sharded", shards=3
    )


@pytest.mark.parametrize(("kind", "model_type"), architectures.tried())
def test_an_architecture_loads_bit_equal_at_every_dtype(
    kind: str, model_type: str, tmp_path: Path, registry: llmload.Registry
) -> None:
    single, sharded = both_folders(kind, model_type, tmp_path)
    for folder, dtype in (
        (single, "bfloat16"),
        (single, "float16"),
        (sharded, "auto"),
        (sharded, "float32"),
    ):
        if model_type in architectures.HALF_REFUSED and dtype != "float32":
            with pytest.raises(RuntimeError, match="same dtype"):
                from_pretrained(architectures.AUTO_CLASSES[kind], folder, dtype=dtype)
        else:
            compare(folder, kind, dtype, registry)


@pytest.mark.skipif(not IS_MODERN, reason="4.51.3 converts nothing")
@pytest.mark.parametrize("model_type", CONVERTED)
def test_experts_that_are_merged_on_the_way_are_read_once(
    model_type: str, tmp_path: Path, registry: llmload.Registry
) -> None:
    single, _ = both_folders("causal_lm", model_type, tmp_path)
    report = compare(single, "causal_lm", "float32", registry).report
    assert report.facts["streaming"]["converted"] > 0


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_a_classification_head_missing_from_the_folder_is_drawn_alike(
    model_type: str, tmp_path: Path, registry: llmload.Registry
) -> None:
    kind = {"bert": "base", "t5": "seq2seq_lm"}.get(model_type, "causal_lm")
    folder = save_checkpoint(architectures.build(kind, model_type), tmp_path / "model")
    for dtype in ("auto", "bfloat16"):
        result = compare(
            folder, "sequence_classification", dtype, registry, strict=False, seen_all=False
        )
        assert result.report.newly_initialised
