"""The reference of a LoRA policy: the same model, its adapter off or frozen as it was loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import stacks
import torch
from sameness import from_pretrained
from test_groups import LORA, bytes_of, logits_of
from transformers import AutoModelForCausalLM

import llmload
from llmload import create_registry, hookimpl
from llmload.testing import IDS, losses, tiny_llama

OFF = {"adapter_of": "policy"}
FROZEN = {"adapter_of": "policy", "frozen_copy": True}

ADAPTERS: dict[str, dict[str, Any]] = {
    "all linear": LORA,
    "dropout": {**LORA, "lora_dropout": 0.5},
    "modules to save": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "dora": {**LORA, "use_dora": True},
}
if stacks.IS_MODERN:  # peft 0.13 trains no single rows
    rows = {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}
    ADAPTERS["single rows"] = rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("view"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained and saved."""
    saved = tmp_path_factory.mktemp("adapter")
    model = llmload.load({"model": str(folder), "dtype": "float32", "lora": LORA}).model
    losses(model, 2)
    model.save_pretrained(saved)
    return saved


def group(folder: Path, lora: dict[str, Any], **others: dict[str, Any]) -> llmload.Group:
    policy = {"model": str(folder), "dtype": "float32", "lora": lora}
    return llmload.load_group({"models": {"policy": policy, **others}})


def state(model: Any) -> dict[str, Any]:
    """Return everything that a view switches for the length of a call."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return {
        "training": [module.training for module in model.modules()],
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "active": [(list(layer.active_adapters), layer.disable_adapters) for layer in layers],
        "model": (model.active_adapter, getattr(model, "_adapters_disabled", False)),
    }


# --- with the adapter off ---------------------------------------------------------------------


@pytest.mark.parametrize("lora", ADAPTERS.values(), ids=ADAPTERS)
def test_with_its_adapter_off_a_trained_policy_is_the_checkpoint(
    folder: Path, lora: dict[str, Any]
) -> None:
    loaded = group(folder, lora, reference=OFF)
    expected = logits_of(from_pretrained(AutoModelForCausalLM, folder, "float32"))
    losses(loaded["policy"].model, 2)
    loaded["policy"].model.eval()
    assert torch.equal(logits_of(loaded["reference"].model), expected)
    assert not torch.equal(logits_of(loaded["policy"].model), expected)


def test_it_takes_no_memory_and_has_nothing_to_train_or_save(folder: Path) -> None:
    loaded = group(folder, LORA, reference=OFF)
    reference = loaded["reference"]
    assert list(reference.model.parameters()) == list(reference.model.buffers()) == []
    assert reference.model.state_dict() == {}
    assert reference.model.model is loaded["policy"].model
    assert reference.tokenizer is loaded["policy"].tokenizer
    policy = loaded["policy"].report
    assert reference.report.parameters == policy.parameters - policy.trainable
    assert reference.report.trainable == reference.plan.trainable == 0
    assert loaded.report.saved_bytes == reference.report.parameter_bytes
    assert loaded.report.shared == loaded.plan.shared
    assert [s.how for s in loaded.report.shared] == ["adapter off"]


# --- with a frozen copy -------------------------------------------------------------------------


@pytest.mark.parametrize("lora", ADAPTERS.values(), ids=ADAPTERS)
def test_a_frozen_copy_stays_what_the_adapter_was_when_it_was_loaded(
    folder: Path, lora: dict[str, Any]
) -> None:
    loaded = group(folder, {**lora, "init_lora_weights": False}, reference=FROZEN)
    expected = logits_of(loaded["policy"].model)
    assert torch.equal(logits_of(loaded["reference"].model), expected)
    losses(loaded["policy"].model, 2)
    loaded["policy"].model.eval()
    assert torch.equal(logits_of(loaded["reference"].model), expected)
    assert not torch.equal(logits_of(loaded["policy"].model), expected)


def test_a_saved_adapter_is_policy_and_reference_as_trl_loads_it_twice(
    folder: Path, adapter: Path
) -> None:
    from peft import PeftModel

    base = from_pretrained(AutoModelForCausalLM, folder, "float32")
    theirs = PeftModel.from_pretrained(base, adapter, is_trainable=True, adapter_name="policy")
    theirs.load_adapter(adapter, adapter_name="reference")
    theirs.eval().set_adapter("reference")
    lora = {"adapter": str(adapter), "adapter_name": "policy"}
    loaded = group(folder, lora, reference=FROZEN, base=OFF)
    model = loaded["policy"].model
    assert list(model.peft_config) == ["policy", "reference"]
    assert torch.equal(logits_of(loaded["reference"].model), logits_of(theirs))
    assert torch.equal(
        logits_of(loaded["base"].model),
        logits_of(from_pretrained(AutoModelForCausalLM, folder, "float32")),
    )
    ours, others = dict(model.named_parameters()), dict(theirs.named_parameters())
    assert ours.keys() == others.keys()
    assert all(torch.equal(ours[name], others[name]) for name in ours)
    trained = [name for name, parameter in ours.items() if parameter.requires_grad]
    assert trained
    assert all("policy" in name for name in trained)


def test_a_copy_of_pissa_keeps_the_base_that_pissa_left(folder: Path) -> None:
    loaded = group(folder, {**LORA, "init_lora_weights": "pissa"}, reference=FROZEN)
    alone = group(folder, {**LORA, "init_lora_weights": "pissa"})["policy"].model
    ours = {n: b for n, b in bytes_of(loaded["policy"].model).items() if "reference" not in n}
    assert ours.keys() == bytes_of(alone).keys()
    assert torch.equal(logits_of(loaded["reference"].model), logits_of(loaded["policy"].model))
    assert loaded["policy"].model.peft_config["reference"].init_lora_weights == "pissa"


def test_making_a_copy_draws_no_random_number_and_trains_nothing_more(folder: Path) -> None:
    def drawn(**others: dict[str, Any]) -> tuple[torch.Tensor, int]:
        torch.manual_seed(0)
        model = group(folder, LORA, **others)["policy"].model
        return torch.get_rng_state(), sum(p.requires_grad for p in model.parameters())

    plain, with_copy = drawn(), drawn(reference=FROZEN)
    assert torch.equal(plain[0], with_copy[0])
    assert plain[1] == with_copy[1]


# --- a call leaves nothing switched ------------------------------------------------------------


@pytest.mark.parametrize("view", [OFF, FROZEN], ids=["off", "frozen"])
@pytest.mark.parametrize("training", [True, False])
def test_a_call_leaves_the_policy_as_it_was(
    folder: Path, view: dict[str, Any], training: bool
) -> None:
    loaded = group(folder, {**LORA, "lora_dropout": 0.5}, reference=view)
    policy, reference = loaded["policy"].model, loaded["reference"].model
    policy.train(training)
    policy.base_model.model.model.layers[0].train(not training)
    next(p for p in policy.parameters() if p.requires_grad).requires_grad_(False)
    before = state(policy)
    drawn = torch.get_rng_state()
    written = reference.generate(input_ids=IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert written.shape == (2, 14)
    assert state(policy) == before
    assert reference(IDS).logits.grad_fn is None
    assert state(policy) == before
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        reference()
    assert state(policy) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    with policy.disable_adapter():
        reference(IDS)


def test_it_can_be_called_between_forward_and_backward(folder: Path) -> None:
    def gradients(*, with_reference: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        loaded = group(folder, {**LORA, "init_lora_weights": False}, reference=OFF)
        policy = loaded["policy"].model.train()
        loss = policy(IDS, labels=IDS).loss
        if with_reference:
            loss = loss + 0 * loaded["reference"].model(IDS).logits.sum()
        loss.backward()
        return [p.grad for p in policy.parameters() if p.grad is not None]

    plain, other = gradients(with_reference=False), gradients(with_reference=True)
    assert len(plain) == len(other) > 0
    assert all(map(torch.equal, plain, other))


def test_moving_or_training_the_view_does_not_reach_the_policy(folder: Path) -> None:
    loaded = group(folder, LORA, reference=OFF)
    policy, reference = loaded["policy"].model.train(), loaded["reference"].model
    reference.eval().train().to(torch.float64)
    assert (reference.training, policy.training) == (False, True)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert reference.config is policy.config
    assert reference.generation_config is policy.generation_config
    assert (reference.device, reference.dtype) == (torch.device("cpu"), torch.float32)


def test_a_merged_policy_is_refused(folder: Path) -> None:
    loaded = group(folder, LORA, reference=OFF)
    loaded["policy"].model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge them first"):
        loaded["reference"].model(IDS)
    loaded["policy"].model.unmerge_adapter()
    loaded["reference"].model(IDS)


# --- refusals ----------------------------------------------------------------------------------


def refused(folder: Path, view: dict[str, Any], registry: Any = None, **policy: Any) -> str:
    """Return the errors of a group that must fail before a weight is read."""
    spec = {"models": {"policy": {"model": str(folder), **policy}, "reference": view}}
    with pytest.raises(llmload.PlanError) as caught:
        llmload.load_group(spec, registry=registry)
    return str(caught.value)


LIKE = "or load a second model with `like: policy`."


def test_a_policy_without_an_adapter_has_none_to_turn_off(folder: Path) -> None:
    assert refused(folder, OFF) == (
        "models.reference.adapter_of: 'policy' is a LlamaForCausalLM without an adapter of PEFT."
        f" Give it an adapter of PEFT, such as the section `lora`, {LIKE}"
    )


def test_an_adapter_that_was_merged_cannot_be_turned_off(folder: Path, adapter: Path) -> None:
    message = refused(folder, OFF, lora={"adapter": str(adapter), "merge": True}, dtype="float32")
    assert message.startswith("models.reference.adapter_of: 'policy' is a LlamaForCausalLM without")


@pytest.mark.parametrize("view", [OFF, FROZEN], ids=["off", "frozen"])
def test_what_is_trained_beside_the_adapter_would_change_the_reference(
    folder: Path, view: dict[str, Any]
) -> None:
    class WithNorm:
        name = "lora_and_norm"

        class Section(llmload.Section):
            pass

        @hookimpl
        def wrap_adapter(self, ctx: Any, model: Any) -> Any:
            from peft import LoraConfig, get_peft_model

            wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
            model.model.norm.requires_grad_(True)
            return wrapped

    registry = create_registry([WithNorm], environ={})
    message = refused(folder, view, registry, lora_and_norm={})
    assert message == (
        "models.reference.adapter_of: 'policy' trains 'base_model.model.model.norm.weight' beside"
        " its adapter, so that its first step would change this member too. Freeze them,"
        f" {LIKE}"
    )


def test_biases_that_are_trained_are_of_the_base(tmp_path: Path) -> None:
    biased = tiny_llama(tmp_path, attention_bias=True)
    message = refused(biased, OFF, lora={**LORA, "bias": "lora_only"})
    assert "trains 'base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias'" in message


def test_an_adapter_that_changed_the_base_leaves_other_weights_when_it_is_off(
    folder: Path,
) -> None:
    message = refused(folder, OFF, lora={**LORA, "init_lora_weights": "pissa"}, dtype="float32")
    assert message.startswith(
        "models.reference.adapter_of: the adapter of 'policy' brings base weights that are not the"
        " checkpoint's ('base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight',"
    )
    assert message.endswith(
        " and 11 more), and turning it off leaves them. Write `frozen_copy: true` for what 'policy'"
        f" starts from, {LIKE}"
    )


def test_a_copy_is_called_as_its_member(folder: Path) -> None:
    message = refused(folder, FROZEN, lora={**LORA, "adapter_name": "reference"})
    assert message == (
        "models.reference.adapter_of: 'policy' has an adapter called 'reference' already, and a"
        " frozen copy is called as its member. Rename the member."
    )


def test_an_adapter_outside_the_layers_cannot_be_turned_off_there(folder: Path) -> None:
    class Prompts:
        name = "prompts"

        class Section(llmload.Section):
            pass

        @hookimpl
        def wrap_adapter(self, ctx: Any, model: Any) -> Any:
            from peft import PromptTuningConfig, get_peft_model

            return get_peft_model(
                model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
            )

    message = refused(folder, OFF, create_registry([Prompts], environ={}), prompts={})
    assert message.startswith(
        "models.reference.adapter_of: 'policy' has an adapter that is not in the layers of its base"
    )


# --- adapters of other systems --------------------------------------------------------------------


class Scale(torch.nn.Module):
    """Scales the logits by a trained factor, unless it is off."""

    def __init__(self, model: torch.nn.Module, device: str) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.full((1,), 2.0, device=device))
        self.is_off = False
        model.lm_head.register_forward_hook(self.scaled)

    def scaled(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output if self.is_off else output * self.factor

    @contextmanager
    def off(self) -> Iterator[None]:
        self.is_off = True
        try:
            yield
        finally:
            self.is_off = False


class ScalePlugin:
    """An adapter system of one parameter."""

    name = "scale"
    stage = "adapter"

    class Section(llmload.Section):
        """Whether it can be turned off."""

        switch: bool = True

    @hookimpl
    def wrap_adapter(self, ctx: llmload.LoadContext, model: Any) -> Any:
        model.requires_grad_(False)
        scale = Scale(model, "meta" if ctx.rehearsing else "cpu")
        model.scale = scale
        if ctx.section(self.Section).switch:
            ctx.adapter_switch = scale
        return model


SCALED = create_registry([ScalePlugin])


def scaled(folder: Path, member: dict[str, Any], **section: Any) -> dict[str, Any]:
    policy = {"model": str(folder), "dtype": "float32", "scale": section}
    return {"models": {"policy": policy, "reference": member}}


def test_an_adapter_that_is_not_pefts_is_turned_off_by_its_plugin(folder: Path) -> None:
    plan = llmload.plan_group(scaled(folder, OFF), registry=SCALED)
    policy, reference = plan.members["policy"], plan.members["reference"]
    assert (policy.parameters - reference.parameters, policy.trainable) == (1, 1)
    assert plan.saved_bytes == reference.parameter_bytes == policy.parameter_bytes - 4

    loaded = llmload.load_group(scaled(folder, OFF), registry=SCALED)
    model, view = loaded["policy"].model, loaded["reference"].model
    assert view.dtype == torch.float32
    with torch.no_grad():
        wanted = from_pretrained(AutoModelForCausalLM, folder, "float32").eval()(IDS).logits
    losses(model, 2)
    assert torch.equal(view(IDS).logits, wanted)
    assert model.training
    assert not model.scale.is_off
    hidden = view.base_model(IDS).last_hidden_state
    with torch.no_grad():  # outside a call of the view the adapter is there
        assert torch.equal(view.get_output_embeddings()(hidden), wanted * model.scale.factor)
    with pytest.raises(TypeError):
        view("no ids")
    assert not model.scale.is_off
    assert not view(IDS).logits.requires_grad


def test_what_an_adapter_of_another_system_cannot_be_is_refused(folder: Path) -> None:
    (problem,) = llmload.plan_group(scaled(folder, FROZEN), registry=SCALED).errors
    assert problem.message == (
        "the adapter of 'policy' is not PEFT's, and can be turned off but not copied"
    )
    assert problem.fix == ("Remove `frozen_copy`, or load a second model with `like: policy`.")
    (problem,) = llmload.plan_group(scaled(folder, OFF, switch=False), registry=SCALED).errors
    assert problem.message == "'policy' is a LlamaForCausalLM without an adapter of PEFT"
