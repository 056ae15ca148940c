"""Every causal language model comes out quantised as it comes out of ``from_pretrained``."""

from __future__ import annotations

from pathlib import Path

import architectures
import pytest
from quantised import load, plain, unlike
from stacks import NO_BITSANDBYTES

import llmload
from llmload.testing import save_checkpoint

if NO_BITSANDBYTES:  # the module, not each type: some are of that transformers alone
    pytest.skip(NO_BITSANDBYTES, allow_module_level=True)

VARIANTS = ({"double_quant": True}, {"bits": 8})

EXCLUDED = {
    "falcon": "its linear layers are of a class of their own, which transformers does not replace",
}


@pytest.fixture(scope="module")
def registry() -> llmload.Registry:
    return llmload.create_registry()


@pytest.mark.parametrize(
    "model_type",
    [name for kind, name in architectures.tried() if kind == "causal_lm" and name not in EXCLUDED],
)
def test_an_architecture_is_quantised_bit_equal(
    model_type: str, tmp_path: Path, registry: llmload.Registry
) -> None:
    model = architectures.build("causal_lm", model_type).bfloat16()
    folder = save_checkpoint(model, tmp_path / "folder")
    for section in VARIANTS:
        result = load(folder, section, registry=registry, prove=False)
        theirs = plain(folder, section).requires_grad_(False)
        assert unlike(result.model, theirs) == []
        assert result.report.loader == "streaming"
