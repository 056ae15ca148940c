"""Parameters that wrap other tensors are counted, compared and probed as what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import llmload
from llmload.plugin import Part, Plain, partitions, probe
from llmload.testing import IDS, assert_plugin, losses, same


class Rows(torch.Tensor):
    """A matrix in 8 bits with a scale for each row, as libraries of quantisation make them."""

    codes: torch.Tensor
    scales: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scales: torch.Tensor) -> Rows:
        made: Rows = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, codes.shape, dtype=scales.dtype, device=codes.device
        )
        made.codes, made.scales = codes, scales
        return made

    @classmethod
    def of(cls, value: torch.Tensor) -> Rows:
        scales = value.abs().amax(1, keepdim=True).clamp(min=1e-6) / 127
        return cls((value / scales).round().to(torch.int8), scales)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scales"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scales)

        def whole(value: Any) -> Any:
            return value.codes * value.scales if isinstance(value, cls) else value

        return func(*tree_map(whole, args), **tree_map(whole, kwargs or {}))


def wrapped(value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(Rows.of(value), requires_grad=False)


def is_wanted(module: nn.Module, attribute: str) -> bool:
    return isinstance(module, nn.Linear) and attribute == "weight"


class Placement(Plain):
    replaceable = False

    def place(self, target: Any, source: Any) -> Any:
        if not is_wanted(target.module, target.attribute):
            return super().place(target, source)
        made = wrapped(source.whole().to(target.dtype))
        source.release()
        return Part(made, made.codes)


class RowsPlugin:
    """Stores linear layers in 8 bits, by nothing but the public surface."""

    name = "rows"
    stage = "quantisation"
    provides = ("quantisation",)

    class Section(llmload.Section):
        """Linear layers in 8 bits."""

    @llmload.hookimpl
    def check(self, ctx: llmload.LoadContext) -> Iterator[llmload.Note]:
        ctx.placed_by = self.name
        yield llmload.Note(text="stores rows")

    @llmload.hookimpl
    def init_context(self, ctx: llmload.LoadContext) -> None:
        ctx.placement = Placement()

    @llmload.hookimpl
    def post_load(self, ctx: llmload.LoadContext, model: nn.Module) -> nn.Module:
        if ctx.rehearsing:
            for module in model.modules():
                if is_wanted(module, "weight"):
                    module.weight = wrapped(module.weight.data)
        return model.requires_grad_(False)


SPEC: dict[str, Any] = {"rows": {}}
REGISTRY = llmload.create_registry([RowsPlugin], environ={})


def test_bytes_are_those_of_what_is_wrapped() -> None:
    weight = wrapped(torch.randn(4, 6))
    assert partitions.wraps(weight)
    assert [part.dtype for part in partitions.stored(weight)] == [torch.int8, torch.float32]
    assert partitions.nbytes(weight) == 4 * 6 + 4 * 4
    assert partitions.elements(weight) == partitions.values(weight) == 4 * 6
    assert partitions.held(weight) is None

    plain = torch.zeros(3, dtype=torch.bfloat16)
    assert not partitions.wraps(plain)
    assert partitions.stored(plain)[0] is plain
    assert partitions.nbytes(plain) == 6


def test_two_are_the_same_if_they_wrap_the_same() -> None:
    value = torch.randn(4, 6)
    one, other = wrapped(value), wrapped(value)
    assert same(one, other)
    assert not same(one, wrapped(value + 1))
    assert not same(one, one.codes * one.scales)


@pytest.mark.parametrize("digests", [False, True])
def test_plan_and_report_count_what_is_stored(
    llmload_checkpoint: Callable[..., Path], digests: bool
) -> None:
    spec = {"model": str(llmload_checkpoint()), "streaming": {"digests": digests}, **SPEC}
    plan = llmload.plan(spec, registry=REGISTRY)
    result = llmload.load(spec, registry=REGISTRY)
    assert result.report.loader == "streaming"
    found = [p for p in result.model.parameters() if partitions.wraps(p)]
    assert len(found) == 15  # the head of this model is a linear layer of its own
    small = sum(partitions.elements(p) + 4 * partitions.shape(p)[0] for p in found)
    others = sum(p.nbytes for p in result.model.parameters() if not partitions.wraps(p))
    assert plan.parameter_bytes == result.report.parameter_bytes == small + others
    assert plan.parameters == result.report.parameters
    assert any("15 could not be compared" in line for line in result.report.audit)
    (warning,) = plan.warnings
    assert warning.where == "rows"


def test_an_adapter_trains_on_it_and_the_probe_sees_it(
    llmload_checkpoint: Callable[..., Path],
) -> None:
    spec = {"model": str(llmload_checkpoint()), "lora": {"r": 2}, **SPEC}
    model = llmload.load(spec, registry=REGISTRY).model
    assert probe(model).method == "meta"
    first, *_, last = losses(model, 4)
    assert last < first


def test_a_group_counts_its_bytes(llmload_checkpoint: Callable[..., Path]) -> None:
    policy = {"model": str(llmload_checkpoint()), "lora": {"r": 2}, **SPEC}
    spec = {"models": {"policy": policy, "reference": {"adapter_of": "policy"}}}
    plan = llmload.plan_group(spec, registry=REGISTRY)
    assert not plan.errors
    whole, base = (plan.members[name].parameter_bytes for name in ("policy", "reference"))
    assert whole - base == 4 * plan.members["policy"].trainable
    assert plan.saved_bytes == base
    group = llmload.load_group(spec, registry=REGISTRY)
    assert group["reference"].model(IDS).logits.isfinite().all()


def test_the_plugin_keeps_the_contract() -> None:
    assert_plugin(RowsPlugin, skip=["light-import"])  # this file imports what tests need
