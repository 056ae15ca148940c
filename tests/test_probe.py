"""The probe sees what a training step would do, and leaves no trace of having looked."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from stacks import needs_bitsandbytes
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import BitsAndBytesConfig, PreTrainedModel

from llmload.model import dry_run as probe_module
from llmload.model import randomness
from llmload.model.dry_run import ProbeResult, probe
from llmload.model.randomness import RandomOp
from llmload.plugin import installed_transformers
from llmload.testing import tiny_model


def with_lora(model: PreTrainedModel, **config: Any) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", **config))


class Wrapped(nn.Module):
    """A model of one function of an embedding, without a config."""

    def __init__(self, forward: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 4)
        self.function = forward

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.function(self, self.embedding(input_ids))


# --- random operations --------------------------------------------------------------------------


def test_each_random_operation_is_named_with_its_module_and_rate() -> None:
    model = tiny_model("gpt2", n_layer=1, resid_pdrop=0.2, embd_pdrop=0.0, attn_pdrop=0.3)
    assert probe(model) == ProbeResult(
        method="meta",
        random_ops=(
            # torch's scaled-dot-product attention drops inside the attention module
            RandomOp(
                op="aten.bernoulli_",
                module="transformer.h.0.attn",
                module_class="GPT2Attention",
                probability=0.3,
            ),
            RandomOp(
                op="aten.bernoulli_",
                module="transformer.h.0.attn.resid_dropout",
                module_class="Dropout",
                probability=0.2,
            ),
            RandomOp(
                op="aten.bernoulli_",
                module="transformer.h.0.mlp.dropout",
                module_class="Dropout",
                probability=0.2,
            ),
        ),
    )


def test_a_model_without_dropout_is_not_random() -> None:
    assert probe(tiny_model("llama")) == ProbeResult(method="meta")


def test_dropout_of_a_frozen_model_in_eval_mode_is_seen_as_training_would() -> None:
    model = tiny_model("gpt2").requires_grad_(False).eval()
    assert probe(model).random_ops
    assert not model.training


@pytest.mark.parametrize(("layerdrop", "found"), [(0.0, []), (0.1, ["aten.rand", "aten.rand"])])
def test_layerdrop_draws_always_and_counts_where_a_layer_may_be_skipped(
    layerdrop: float, found: list[str]
) -> None:
    model = tiny_model("opt", dropout=0.0, attention_dropout=0.0, layerdrop=layerdrop)
    result = probe(model)
    assert [op.op for op in result.random_ops] == found
    assert all(op.module == "model.decoder" for op in result.random_ops)
    assert not result.unreached, "no layer is skipped while looking"


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (lambda m, x: x + torch.randn_like(x), ["aten.randn_like"]),
        (lambda m, x: x * torch.empty_like(x).uniform_(0.9, 1.1), ["aten.uniform_"]),
        (lambda m, x: torch.cat([x, torch.rand(1, 1, 4, device=x.device)], 1), ["aten.rand"]),
        (lambda m, x: nn.functional.dropout(x, 0.0), []),
        (lambda m, x: nn.functional.dropout(x, 1.0), []),
        (lambda m, x: nn.functional.dropout(x, 0.5, training=False), []),
        (lambda m, x: torch.rand(3) is None or x, []),
        (lambda m, x: x if torch.rand([]) >= 0.0 else -x, []),
        (lambda m, x: x if torch.rand([]) >= 0.5 else -x, ["aten.rand"]),
    ],
    ids=[
        "noise added",
        "noise in place",
        "noise in a list",
        "rate 0",
        "rate 1",
        "not in training",
        "drawn and not used",
        "compared with one outcome",
        "compared with two outcomes",
    ],
)
def test_an_operation_is_random_if_its_draw_can_change_the_result(
    forward: Callable[[nn.Module, torch.Tensor], torch.Tensor], found: list[str]
) -> None:
    result = probe(Wrapped(forward))
    assert result.method == "meta"
    assert [(op.op, op.module) for op in result.random_ops] == [(name, "") for name in found]


# --- gradient paths -----------------------------------------------------------------------------


def test_lora_on_a_frozen_base_is_reached() -> None:
    assert probe(with_lora(tiny_model("llama"))).unreached == ()


def test_a_trainable_parameter_that_the_forward_does_not_use_is_unreached() -> None:
    model = tiny_model("llama")
    model.model.register_parameter("spare", nn.Parameter(torch.zeros(3)))
    assert probe(model).unreached == ("model.spare",)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("input_gradients", [True, False])
def test_reentrant_checkpointing_of_a_frozen_base_needs_input_gradients(
    reentrant: bool, input_gradients: bool
) -> None:
    model = with_lora(tiny_model("llama"))
    base = model.get_base_model()
    installed_transformers().enable_checkpointing(
        base, {"use_reentrant": reentrant}, every_n_layers=1, offload=False
    )
    if hasattr(base, "_require_grads_hooks"):
        base.disable_input_require_grads()  # transformers 5 has turned them on by itself
    if input_gradients:
        base.enable_input_require_grads()
    result = probe(model)
    # Checkpointing of torch 2.5 knows no meta device; a small model then runs for real.
    assert result.method == "meta" or not hasattr(torch, "accelerator")
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    cut_off = reentrant and not input_gradients
    assert list(result.unreached) == (trainable if cut_off else [])


def test_tied_weights_are_reached_under_the_name_they_have() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    assert probe(model) == ProbeResult(method="meta")
    model.lm_head = nn.Linear(16, 128, bias=False)
    model.lm_head.weight.requires_grad_(False)
    model.model.embed_tokens = nn.Embedding.from_pretrained(torch.zeros(128, 16), freeze=True)
    model.model.register_parameter("spare", nn.Parameter(torch.zeros(3)))
    assert probe(model).unreached == ("model.spare",)


@needs_bitsandbytes
def test_a_quantised_base_is_probed_without_its_weights(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    model = type(tiny_model("llama")).from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    before = copy.deepcopy(model.state_dict())
    result = probe(with_lora(model, lora_dropout=0.25))
    assert (result.method, result.unreached) == ("meta", ())
    assert {op.probability for op in result.random_ops} == {0.25}
    assert all("lora_dropout" in op.module for op in result.random_ops)
    assert all(
        torch.equal(
            tensor, before[name.replace("base_model.model.", "").replace(".base_layer", "")]
        )
        for name, tensor in model.state_dict().items()
        if "lora" not in name
    )


# --- inputs -------------------------------------------------------------------------------------


def test_the_forward_takes_the_inputs_that_are_given() -> None:
    model = tiny_model("llama")
    ids = torch.arange(4).reshape(2, 2)
    assert probe(model, {"input_ids": ids, "labels": ids}) == ProbeResult(method="meta")
    assert probe(model, {"no_such_argument": ids}).method == "unavailable"


@pytest.mark.parametrize(
    ("model_type", "auto_class"),
    [
        ("bert", "base"),
        ("t5", "seq2seq_lm"),
        ("t5", "sequence_classification"),
        ("llama", "sequence_classification"),
    ],
)
def test_every_kind_of_head_runs_on_example_inputs(model_type: str, auto_class: str) -> None:
    assert probe(tiny_model(model_type, auto_class=auto_class)).method != "unavailable"


# --- where meta tensors do not suffice ----------------------------------------------------------


def test_a_small_model_that_looks_at_values_runs_for_real() -> None:
    result = probe(Wrapped(lambda m, x: x * float(x.sum())))
    assert result == ProbeResult(
        method="real",
        reason="on meta tensors: RuntimeError: Tensor.item() cannot be called on meta tensors",
    )


def test_a_large_model_that_looks_at_values_is_unavailable_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe_module, "SMALL", 10)
    assert probe(Wrapped(lambda m, x: x * float(x.sum()))) == ProbeResult(
        method="unavailable",
        reason="on meta tensors: RuntimeError: Tensor.item() cannot be called on meta tensors",
    )


def test_a_model_of_several_dtypes_that_wants_autocast_is_probed_in_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(model: Any, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != model.linear.weight.dtype:
            raise RuntimeError("expected one dtype")
        return nn.functional.dropout(model.linear(x), 0.5, model.training)

    monkeypatch.setattr(probe_module, "SMALL", 10)
    model = Wrapped(refuse)
    model.linear = nn.Linear(4, 4, dtype=torch.bfloat16)
    result = probe(model)
    assert (result.method, result.reason) == (
        "meta",
        "on meta tensors: RuntimeError: expected one dtype",
    )
    assert [op.probability for op in result.random_ops] == [0.5]
    assert result.unreached == ()
    assert model.linear.weight.dtype == torch.bfloat16


def test_a_forward_that_fails_either_way_is_unavailable_with_both_reasons() -> None:
    def fail(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise ValueError(f"not on {x.device.type}\nand more")

    assert probe(Wrapped(fail)) == ProbeResult(
        method="unavailable",
        reason="on meta tensors: ValueError: not on meta; for real: ValueError: not on cpu",
        raised="ValueError: not on cpu",
    )


@pytest.mark.parametrize("model_type", ["mixtral", "jetmoe"])
def test_experts_are_all_reached(model_type: str) -> None:
    assert probe(architectures.build("causal_lm", model_type)).unreached == ()


# --- leaving no trace ---------------------------------------------------------------------------


def run_for_real(model: nn.Module) -> ProbeResult:
    return probe_module._run(model, None, (), on_meta=False, reason="")


@pytest.mark.parametrize("look", [probe, run_for_real], ids=["on meta", "for real"])
def test_the_model_and_all_random_states_are_left_as_they_were(
    look: Callable[[nn.Module], ProbeResult],
) -> None:
    model = with_lora(tiny_model("opt"), lora_dropout=0.1)
    model.train()
    model.base_model.model.model.decoder.layers[0].eval()
    objects = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in objects.items()}
    gradient = torch.ones_like(values[next(iter(values))])
    next(model.parameters()).grad = gradient
    modes = [module.training for module in model.modules()]
    attributes = [dict(vars(module)) for module in model.modules()]
    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    assert look(model).random_ops

    assert all(p is objects[name] for name, p in model.named_parameters())
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert next(model.parameters()).grad is gradient
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert [module.training for module in model.modules()] == modes
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


@pytest.mark.parametrize("look", [probe, run_for_real], ids=["on meta", "for real"])
def test_running_statistics_and_plain_tensors_are_left_as_they_were(
    look: Callable[[nn.Module], ProbeResult],
) -> None:
    def normalise(model: Any, x: torch.Tensor) -> torch.Tensor:
        model.calls = model.calls + 1
        return model.norm(x.flatten(0, 1)) * model.scale

    model: Any = Wrapped(normalise)
    model.norm, model.scale, model.calls = nn.BatchNorm1d(4), torch.ones(4), 0
    look(model)
    assert torch.equal(model.norm.running_mean, torch.zeros(4))
    assert model.norm.num_batches_tracked == 0
    assert torch.equal(model.scale, torch.ones(4))
    assert model.calls == 0


def test_a_module_that_the_forward_replaces_is_put_back() -> None:
    model = architectures.build("base", "big_bird")
    attention = model.encoder.layer[0].attention
    before = attention.self
    assert probe(model).method == "meta"
    assert attention.self is before
    assert attention.attention_type == "block_sparse"


@pytest.mark.parametrize("on_meta", [True, False])
def test_watched_modules_tell_the_shape_of_what_they_return(on_meta: bool) -> None:
    model = tiny_model("llama")
    if not on_meta:

        def look(module: nn.Module, args: Any, output: Any) -> None:
            output.logits.sum().item()

        model.register_forward_hook(look)
    watch = ["model.layers.1.mlp.up_proj", "model.layers.0", "model", "model.layers"]
    found = probe(model, watch=watch)
    assert found.method == ("meta" if on_meta else "real")
    # An output of several tensors tells of its first; nobody calls the list.
    assert found.outputs == {
        "model.layers.1.mlp.up_proj": (1, 8, 32),
        "model.layers.0": (1, 8, 16),
        "model": (1, 8, 16),
    }
    assert not model.model.layers[0]._forward_hooks


def test_a_forward_that_raises_leaves_the_model_as_it_was() -> None:
    def fail(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("no")

    model = Wrapped(fail).eval()
    weight = model.embedding.weight
    probe(model)
    assert model.embedding.weight is weight
    assert not model.training


def test_no_weight_is_read() -> None:
    with torch.device("meta"):
        model = tiny_model("llama")
    assert all(p.is_meta for p in model.parameters())
    assert probe(with_lora(model)) == ProbeResult(method="meta")


# --- what is answered at once -------------------------------------------------------------------


@st.composite
def operands(draw: st.DrawFn) -> tuple[Any, ...]:
    """Draw two operands on the meta device, often of one dtype, broadcast, permuted or a number."""
    dtypes = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.int64])
    shape = draw(st.lists(st.integers(1, 3), min_size=0, max_size=4))

    def tensor(shape: list[int]) -> torch.Tensor:
        made = torch.empty(shape, dtype=draw(dtypes), device="meta")
        if shape and draw(st.booleans()):
            return made.permute(*draw(st.permutations(range(len(shape)))))
        return made

    second = draw(st.sampled_from(["number", "tensor"]))
    if second == "number":
        return tensor(shape), draw(st.sampled_from([2, 0.5, True, 1j]))
    other = [draw(st.sampled_from([1, size])) for size in shape]
    return tensor(shape), tensor(other[draw(st.integers(0, len(other))) :])


@given(operands())
@settings(deadline=None)
def test_elementwise_operations_give_what_torchs_own_meta_kernels_give(
    given: tuple[Any, ...],
) -> None:
    def outcome(answer: Callable[[Any], torch.Tensor], func: Any) -> Any:
        try:
            result = answer(func)
        except Exception as error:
            return type(error), str(error)
        strides = [s for s, size in zip(result.stride(), result.shape, strict=True) if size > 1]
        return result.shape, result.dtype, result.device, strides

    for func in randomness._ELEMENTWISE:
        args = given if func._overloadname in ("Tensor", "Scalar", "Tensor_Scalar") else given[:1]
        if "Scalar" in func._overloadname and isinstance(args[1], torch.Tensor):
            continue
        ours = outcome(lambda func, args=args: randomness._answer(func, args, {}), func)
        assert ours == outcome(lambda func, args=args: func(*args), func), (func, args)


def test_tensors_of_a_class_of_their_own_are_left_to_it() -> None:
    own = TwoTensor(torch.empty(2, device="meta"), torch.empty(2, device="meta"))
    assert own.is_meta
    assert type(randomness._answer(torch.ops.aten.mul.Tensor, (own, 2.0), {})) is TwoTensor
