"""Every text architecture of transformers, loaded through ``llmload``.

One tiny checkpoint per type and kind, made from its config with every dropout at 0.3, serves all
tests of that type. What cannot be built tiny is listed with its reason in ``architectures.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import architectures
import pytest
import torch
from stacks import IS_MODERN
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

import llmload
from llmload.errors import AuditError, PlanError

DROPOUT = 0.3
KINDS = {
    "causal_lm": architectures.causal_lm_types,
    "seq2seq_lm": architectures.seq2seq_types,
    "base": architectures.encoder_types,
}
UNREACHABLE = {
    "phimoe": "its router samples the experts",
    "reformer": "its hashing attention draws rotations in every forward",
}
"""Types that stay random in training whatever their dropout is."""
_ARGUMENTS = "PEFT passes its forward an argument twice, or one that it does not take"
_NAMESAKES = "PEFT adapts by the last part of a name, which a container of such layers has too"
NO_LORA = {
    "clip_text_model": _ARGUMENTS,
    "reformer": "its reversible layers pass gradients on only where the inputs have some",
}
NO_LORA |= (
    {
        **dict.fromkeys(
            ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"),
            "PEFT refuses to adapt the projections of Mamba layers",
        ),
        **dict.fromkeys(
            ("llama4", "llama4_text", "phimoe"),
            "PEFT adapts its router, a linear layer that returns a tuple, and then fails",
        ),
        "deepseek_v4": "PEFT adapts its grouped linear layer as if it were an ordinary one",
    }
    if IS_MODERN
    else {
        **dict.fromkeys(("fnet", "mra", "qwen2_audio"), _ARGUMENTS),
        **dict.fromkeys(("ctrl", "git", "gptsan-japanese"), _NAMESAKES),
        "ibert": "PEFT does not know its quantised linear layers",
    }
)
"""Types on which LoRA on all linear layers cannot be trained, each with the reason."""
TIED_HEADS = {} if IS_MODERN else {"tied_weights": "separate"}
"""PEFT 0.13.2 adapts some heads that are tied to the embedding, for which a choice is asked."""
REFUSES_DROPOUT = {"diffllama"}
"""Types whose class cannot be built with dropout."""


class Saved(NamedTuple):
    """A tiny checkpoint of one architecture."""

    kind: str
    model_type: str
    folder: Path
    changed: int
    """How many dropout fields of its config were set to ``DROPOUT``."""


@pytest.fixture(
    scope="module",
    params=architectures.tried(),
    ids=lambda param: "-".join(param),
)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    kind, model_type = request.param
    model = architectures.build(kind, model_type)
    changed = 0 if model_type in REFUSES_DROPOUT else set_dropout(model.config, DROPOUT)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return Saved(kind, model_type, folder, changed)


def set_dropout(config: Any, rate: float) -> int:
    """Set every fraction whose name speaks of dropping; returns how many there are."""
    changed = 0
    fields = config if isinstance(config, dict) else vars(config)
    for name, value in list(fields.items()):
        if isinstance(value, dict | PretrainedConfig):
            changed += set_dropout(value, rate)
        elif "drop" in str(name) and isinstance(value, float) and 0 <= value <= 1:
            if isinstance(config, dict):
                config[name] = rate
            else:
                setattr(config, name, rate)
            changed += 1
    return changed


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.refused_late  # whether a forward runs shows when it does
def test_training_forward_is_bit_equal_when_dropout_is_off(saved: Saved) -> None:
    spec = {"model": str(saved.folder), "auto_class": saved.kind, "dropout": {"p": 0.0}}
    if saved.model_type in UNREACHABLE:
        with pytest.raises(PlanError, match=f"model type '{saved.model_type}' draws"):
            llmload.load(spec)
        return
    if (saved.kind, saved.model_type) in architectures.NO_FORWARD:
        with pytest.raises(AuditError, match=r"the forward of .* fails on a row of token ids"):
            llmload.load(spec)
        return
    model = llmload.load(spec).model.train()
    inputs = architectures.dummy_inputs(model, saved.kind)
    first, second = (list(tensors(model(**inputs))) for _ in range(2))
    assert first
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_loaded_model_is_bit_equal_to_from_pretrained(saved: Saved, dtype: str) -> None:
    if saved.model_type in architectures.HALF_REFUSED and dtype != "auto":
        pytest.skip(architectures.HALF_REFUSED[saved.model_type])
    spec = {"model": str(saved.folder), "auto_class": saved.kind, "dtype": dtype}
    ours = llmload.load(spec).model
    theirs = architectures.AUTO_CLASSES[saved.kind].from_pretrained(
        saved.folder,
        torch_dtype=dtype,  # both transformers 4.51 and 5 take this name
    )
    assert type(ours) is type(theirs)
    for kind in ("named_parameters", "named_buffers"):
        mine, reference = dict(getattr(ours, kind)()), dict(getattr(theirs, kind)())
        assert list(mine) == list(reference)
        for name, tensor in reference.items():
            assert mine[name].dtype == tensor.dtype, name
            assert mine[name].shape == tensor.shape, name
            assert torch.equal(bits(mine[name]), bits(tensor)), name


@pytest.mark.refused_late  # whether a forward runs shows when it does
def test_one_step_of_lora_on_all_linear_layers_changes_only_the_adapter(saved: Saved) -> None:
    if saved.model_type in NO_LORA:
        with pytest.raises((AuditError, PlanError, AttributeError, RuntimeError, TypeError)):
            train_one_step(saved)
        return
    trainable, changed = train_one_step(saved)
    assert changed
    assert changed <= trainable
    assert all(".lora_" in name for name in trainable)


def train_one_step(saved: Saved) -> tuple[set[str], set[str]]:
    """Take one step of gradient descent; returns the trainable and the changed parameters."""
    spec = {
        "model": str(saved.folder),
        "auto_class": saved.kind,
        # A step in which LayerDrop skipped every layer would change nothing.
        "dropout": {} if saved.model_type not in UNREACHABLE else {"p": 0.1},
        "lora": {"r": 2, "target_modules": "all-linear", **TIED_HEADS},
    }
    model = llmload.load(spec).model.train()
    model.config.use_cache = False
    trainable = [p for p in model.parameters() if p.requires_grad]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    outputs = model(**architectures.dummy_inputs(model, saved.kind))
    sum(t.square().mean() for t in tensors(outputs) if t.requires_grad).backward()
    torch.optim.SGD(trainable, lr=0.1).step()
    return (
        {name for name, p in model.named_parameters() if p.requires_grad},
        {n for n, p in model.named_parameters() if not torch.equal(bits(p), bits(before[n]))},
    )


def test_every_type_is_built_or_excluded_with_a_reason() -> None:
    mapped = {
        "causal_lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "seq2seq_lm": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    for kind, names in mapped.items():
        known = set(KINDS[kind]()) | set(architectures.EXCLUDED[kind])
        assert known == set(names) if IS_MODERN else known >= set(names)
    assert all(reason for kind in architectures.EXCLUDED.values() for reason in kind.values())
    assert len(architectures.causal_lm_types()) >= (150 if IS_MODERN else 90)
