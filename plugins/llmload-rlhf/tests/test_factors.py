"""LoRA factors that old coati kept beside the weights are merged into them, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from making import IDS, MASK, load, read, refusal, saved, write
from torch import nn
from torch.nn import functional

import llmload
from llmload.testing import same

RANK = 2
CASES = [("reward_head", "0.2.8"), ("critic_head", "0.2.8"), ("critic_head", "0.3.4")]


class LoraLinear(nn.Module):
    """Old coati's layer: factors as parameters of its own, scaled by 1 / r."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(torch.randn(RANK, linear.in_features).to(self.weight) * 0.2)
        self.lora_B = nn.Parameter(torch.randn(linear.out_features, RANK).to(self.weight) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added = (x @ self.lora_A.t() @ self.lora_B.t()) * (1 / RANK)
        return functional.linear(x, self.weight, self.bias) + added


def converted(module: nn.Module, *, spared: str = "") -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            if name != spared:
                setattr(module, name, LoraLinear(child))
        else:
            converted(child, spared=spared)


def adapted(
    folder: Path, section: str, dtype: torch.dtype = torch.float32, model_type: str = "llama"
) -> tuple[Path, Any]:
    """Save a model with factors in every linear layer, a critic's head among them."""
    _, theirs = saved(folder, "coati", model_type, dtype=dtype)
    torch.manual_seed(4)
    converted(theirs, spared="value_head" if section == "reward_head" else "")
    return write(folder, theirs.state_dict()), theirs


@pytest.mark.parametrize(("section", "version"), CASES)
@pytest.mark.parametrize("cut", [False, True], ids=["whole keys", "keys cut"])
def test_factors_are_added_to_the_weights_bit_by_bit(
    section: str, version: str, cut: bool, tmp_path: Path
) -> None:
    folder, theirs = adapted(tmp_path, section)
    state = theirs.state_dict()
    if cut:
        write(folder, {key.replace("model.", "", 1): value for key, value in state.items()})
    result = load(folder, (section, "coati"), head_version=version)
    model = result.model
    for name, parameter in model.named_parameters():
        wanted = state[name]
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A" in state:
            wanted = wanted + (state[f"{stem}.lora_B"] @ state[f"{stem}.lora_A"]) * (1 / RANK)
        assert same(parameter, wanted), name
        assert parameter.requires_grad
    merged = [key for key in state if key.endswith("lora_A")]
    assert len(merged) == 14 + (section == "critic_head")
    assert result.report.left_out == {}
    assert result.report.newly_initialised == {}
    (step,) = [step for step in result.plan.steps if step.plugin == section]
    assert f"LoRA factors of {len(merged)} layers are merged, scaled by 1 / r (r: 2)" in step.notes
    values = theirs(IDS, MASK, pooled=False)
    wanted = values[:, :-1].mean(1) if version == "0.2.8" else theirs(IDS, MASK)
    torch.testing.assert_close(model(IDS, attention_mask=MASK), wanted, rtol=1e-3, atol=1e-4)


def test_the_sum_is_rounded_once(tmp_path: Path) -> None:
    folder, theirs = adapted(tmp_path, "critic_head", torch.bfloat16)
    model = load(folder, ("critic_head", "coati"), head_version="0.2.8").model
    state = theirs.state_dict()
    stem = "model.layers.0.mlp.up_proj"
    a, b, weight = (state[f"{stem}.{part}"].float() for part in ("lora_A", "lora_B", "weight"))
    wanted = (weight + (b @ a) / RANK).bfloat16()
    assert same(model.get_parameter(f"{stem}.weight"), wanted)


def test_a_critic_of_gpt2_has_factors_in_its_head_alone(tmp_path: Path) -> None:
    folder, theirs = adapted(tmp_path, "critic_head", model_type="gpt2")
    assert [key for key in theirs.state_dict() if "lora_" in key] == [
        "value_head.lora_A",
        "value_head.lora_B",
    ]
    result = load(folder, ("critic_head", "coati"), head_version="0.2.8")
    assert "LoRA factors of 1 layer are merged" in str(result.plan)
    head = theirs.value_head
    assert same(result.model.value_head.weight, head.weight + head.lora_B @ head.lora_A / RANK)


def test_what_no_version_scales_is_refused(tmp_path: Path) -> None:
    folder, _ = adapted(tmp_path, "critic_head")
    assert refusal(folder, ("critic_head", "coati")) == (
        "critic_head.version: the checkpoint keeps 30 LoRA factors beside its weights, as"
        " 'model.layers.0.mlp.down_proj.lora_A', and no file says how colossalchat scaled them."
        " If an old coati saved it, write `version: 0.2.8` or `version: 0.3.4`, which merge them;"
        " otherwise merge them before they are saved."
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lora_B", None, "lora_A: the checkpoint has no 'STEM.lora_B' beside it"),
        ("lora_A", None, "lora_B: the checkpoint has no 'STEM.lora_A' beside it"),
        ("lora_A", torch.ones(3, 16), "lora_A: factors of shapes (32, 2) and (3, 16) do not fit"),
        ("lora_B", torch.ones(7, 2), "lora_A: factors of shapes (7, 2) and (2, 16) do not fit"),
    ],
)
def test_factors_that_do_not_fit_are_refused_by_name(
    key: str, value: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    folder, _ = adapted(tmp_path, "critic_head")
    state, stem = read(folder), "model.layers.1.mlp.up_proj"
    state[f"{stem}.{key}"] = value
    write(folder, {name: tensor for name, tensor in state.items() if tensor is not None})
    found = refusal(
        folder, ("critic_head", "coati"), error=llmload.LlmloadError, head_version="0.2.8"
    )
    assert f"{stem}.{message}".replace("STEM", stem) in found


def test_factors_of_a_layer_that_is_not_there_are_refused(tmp_path: Path) -> None:
    folder, _ = adapted(tmp_path, "critic_head")
    state = read(folder)
    more = {f"model.layers.9.x.{part}": torch.ones(2, 2) for part in ("lora_A", "lora_B")}
    write(folder, state | more)
    found = refusal(
        folder, ("critic_head", "coati"), error=llmload.LlmloadError, head_version="0.2.8"
    )
    assert "layers.9.x.lora_A: the model has no weight for this LoRA factor" in found


def test_factors_are_not_added_to_quantised_weights(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder, _ = adapted(tmp_path, "reward_head")
    found = refusal(
        folder,
        ("reward_head", "coati"),
        error=llmload.LlmloadError,
        head_version="0.2.8",
        head_trainable=False,
        kbit={"bits": 4},
    )
    assert "kbit: the checkpoint keeps LoRA factors beside its weights, and they cannot be" in found
