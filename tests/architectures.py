"""Every text architecture of the installed transformers, built tiny from its own config class.

The types come from transformers' auto mappings, their configs from ``llmload.testing.tiny_config``.
``EXCLUDED`` holds what cannot be built tiny, with the reason. No network.
"""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from llmload.testing import tiny_config

ALL = os.environ.get("LLMLOAD_TEST_ARCHITECTURES") == "all"
"""Whether tests of every type take every type; set by ``nox -s architectures``."""
WIDELY_USED = (
    *("bloom", "deepseek_v3", "falcon", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss"),
    *("jamba", "llama", "mamba2", "mistral", "mixtral", "opt", "phi3", "qwen2", "qwen3"),
    *("qwen3_moe", "qwen3_next", "bart", "t5", "bert", "modernbert", "roberta"),
)
"""Types that are always among those that are tried."""
STRIDE = 4

AUTO_CLASSES: dict[str, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "seq2seq_lm": AutoModelForSeq2SeqLM,
    "base": AutoModel,
    "sequence_classification": AutoModelForSequenceClassification,
}

EXCLUDED: dict[str, dict[str, str]] = {
    "causal_lm": {
        "dots3_note": "its vision tower fixes the number of experts of each of its 42 layers",
        "emu3": "AutoModelForCausalLM cannot read back the text model that it saves",
        "gemma3n": "its vision tower needs the timm package",
        "gemma4_assistant": "its forward takes the states of the model that it assists",
        "gemma4_unified_assistant": "its forward takes the states of the model that it assists",
        "mllama": "AutoModelForCausalLM cannot read back the text model that it saves",
        "musicgen": "AutoModelForCausalLM cannot build it from its own (composite) config",
        "musicgen_melody": "AutoModelForCausalLM cannot build it from its own (composite) config",
    },
    "seq2seq_lm": {
        "voxtral_realtime": "its forward takes audio",
    },
    "base": {
        "perceiver": "AutoModel builds it without a preprocessor: its forward takes no token ids",
    },
}
"""Types that cannot be built tiny, or not saved, by kind, with the reason."""

if int(metadata.version("transformers").split(".")[0]) < 5:
    EXCLUDED["causal_lm"] |= {
        "dbrx": "its attention config refuses what it writes itself",
        "llama4": "its composite config has no vocabulary of its own",
        "llama4_text": "it casts queries to another dtype than keys and values",
        "mega": "as a decoder it refuses its own default config",
        "phi4_multimodal": "its default config has no vision part",
        "qdqbert": "it needs the pytorch-quantization package",
        "speech_to_text_2": "it is deprecated, and its positional embedding cannot be built",
        "transfo-xl": "it is deprecated, and its vocabulary cannot be shrunk",
        "zamba2": "4.51.3 cannot save its shared blocks as safetensors",
    }
    EXCLUDED["seq2seq_lm"] |= {
        "encoder-decoder": "it has no default config",
    }
    EXCLUDED["base"] |= {
        "emu3": "AutoModel does not know it",
        "llama4": "it casts queries to another dtype than keys and values",
        "mllama": "AutoModel does not know it",
        "qdqbert": "it needs the pytorch-quantization package",
        "wav2vec2": "its forward takes audio",
    }


NO_FORWARD = {
    ("base", "llama4"): "transformers 5.24 asks its text model for images, which that knows not of",
}
"""Kinds and types whose forward raises whatever is done with them, with the reason."""

HALF_REFUSED = {
    "nezha": "its constructor multiplies float32 by what has the default dtype",
}
"""Types that ``from_pretrained`` itself builds in float32 only, with the reason; gone with 5.0."""


def causal_lm_types() -> list[str]:
    """List the model types of ``AutoModelForCausalLM`` that can be built tiny, sorted."""
    return _types("causal_lm", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def seq2seq_types() -> list[str]:
    """List the model types of ``AutoModelForSeq2SeqLM`` that can be built tiny, sorted."""
    return _types("seq2seq_lm", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)


def encoder_types() -> list[str]:
    """List the text encoders of ``AutoModel`` that can be built tiny, sorted.

    A text encoder here is a type with a masked-language or text-encoding head in transformers that
    is no sequence-to-sequence type.
    """
    names = {
        **modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    }
    seq2seq = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return _types("base", {name: "" for name in names if name not in seq2seq})


def every() -> list[tuple[str, str]]:
    """List kind and model type of all of them."""
    return [(kind, name) for kind, names in _by_kind().items() for name in names]


def tried() -> list[tuple[str, str]]:
    """List kinds and model types for a test of every type.

    These are the widely used ones and one of four others, or all; see ``ALL``.
    """
    return [
        (kind, name)
        for kind, names in _by_kind().items()
        for number, name in enumerate(names)
        if ALL or name in WIDELY_USED or number % STRIDE == 0
    ]


def counted(request: pytest.FixtureRequest, what: str) -> Iterator[Counter[str]]:
    """Be a fixture that counts how comparisons end, and prints it when all are done."""
    found: Counter[str] = Counter()
    yield found
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        lines = [f"{count} {outcome}" for outcome, count in found.most_common()]
        reporter.write_line(f"\n{found.total()} {what}: {', '.join(lines)}")


def _by_kind() -> dict[str, list[str]]:
    return {"causal_lm": causal_lm_types(), "seq2seq_lm": seq2seq_types(), "base": encoder_types()}


def _types(kind: str, names: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in names if name not in EXCLUDED[kind])


def build(kind: str, model_type: str, *, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Build ``model_type`` tiny in float32 with seeded weights; ``fields`` go into the config."""
    config = tiny_config(model_type, **fields)
    if kind == "causal_lm" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AUTO_CLASSES[kind].from_config(config)


def dummy_inputs(model: PreTrainedModel, kind: str) -> dict[str, Any]:
    """Make the inputs of one forward: two rows of eight token ids, all attended to."""
    ids = torch.arange(4, 20).reshape(2, 8)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "seq2seq_lm":
        inputs["decoder_input_ids"] = ids
    taken = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in taken):
        return inputs
    return {name: inputs[name] for name in inputs.keys() & {p.name for p in taken}}
