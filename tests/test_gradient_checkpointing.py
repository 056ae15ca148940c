"""Gradient checkpointing: it is on, it saves memory, and gradients reach the adapter."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from peft import LoraConfig, get_peft_model
from stacks import IS_MODERN, needs_transformers_5
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import llmload
from llmload.builtin.gradient_checkpointing.plugin import (
    GradientCheckpointingPlugin,
    _has_accelerator,
)
from llmload.builtin.gradient_checkpointing.section import GradientCheckpointingSection
from llmload.plugin import installed_transformers
from llmload.testing import context_of, save_checkpoint, tiny_checkpoint, tiny_llama

REENTRANT = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not"])
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
IDS = torch.arange(3, 19).reshape(2, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("checkpointing"), num_hidden_layers=4)


def load(folder: Path, section: dict[str, Any], **keys: Any) -> llmload.LoadResult:
    return llmload.load({"model": str(folder), "gradient_checkpointing": section, **keys})


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Run one training step's forward and backward."""
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def layer_calls(model: Any) -> list[int]:
    """Count how often each layer runs in one forward and backward: twice if it checkpoints."""
    layers = model.get_submodule("model.layers")
    calls = [0] * len(layers)
    for index, layer in enumerate(layers):

        def count(*args: Any, index: int = index) -> None:
            calls[index] += 1

        # Before its first step: torch stops recomputing once the last kept tensor is there.
        layer.input_layernorm.register_forward_pre_hook(count)
    gradients(model)
    return calls


# --- it is on ---------------------------------------------------------------------------------


@REENTRANT
def test_every_layer_is_computed_again_and_gradients_are_those_of_plain_training(
    folder: Path, use_reentrant: bool
) -> None:
    checkpointed = load(folder, {"use_reentrant": use_reentrant}).model
    assert layer_calls(checkpointed) == [2, 2, 2, 2]
    plain = llmload.load({"model": str(folder)}).model
    expected = gradients(plain)
    found = {name: p.grad for name, p in checkpointed.named_parameters()}
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_the_section_no_layer_is_computed_again(folder: Path) -> None:
    assert layer_calls(llmload.load({"model": str(folder)}).model) == [1, 1, 1, 1]


@needs_transformers_5
def test_one_layer_in_n_is_computed_again(folder: Path) -> None:
    result = load(folder, {"every_n_layers": 3})
    assert layer_calls(result.model) == [2, 1, 1, 2]
    assert result.report.facts["gradient_checkpointing"]["modules"] == 3  # two layers, their model
    assert notes(result.plan) == ["non-reentrant, one layer in 3"]


def test_activations_are_let_go(folder: Path) -> None:
    """What the first layer's MLP computed is freed before the backward."""

    def kept(model: Any) -> int:
        alive: list[weakref.ref[torch.Tensor]] = []
        hook = model.model.layers[0].mlp.act_fn.register_forward_hook(
            lambda module, inputs, output: alive.append(weakref.ref(output))
        )
        output = model.train()(input_ids=IDS, labels=IDS)
        hook.remove()
        assert output.loss.requires_grad
        return sum(reference() is not None for reference in alive)

    assert kept(load(folder, {}).model) == 0
    assert kept(llmload.load({"model": str(folder)}).model) == 1


def test_torchs_options_arrive(folder: Path) -> None:
    section = {"preserve_rng_state": False, "determinism_check": "none"}
    model = load(folder, section).model
    # On the layers since transformers 5, on their model before.
    holder = next(m for m in model.modules() if hasattr(m, "_gradient_checkpointing_func"))
    assert holder._gradient_checkpointing_func.keywords == {
        "use_reentrant": False,
        "preserve_rng_state": False,
        "determinism_check": "none",
    }


def test_the_cache_is_off_in_the_forward_and_stays_on_for_generation(folder: Path) -> None:
    model = load(folder, {}).model
    assert model.config.use_cache is False
    assert model(input_ids=IDS).past_key_values is None
    assert model.generation_config.use_cache is True


def test_the_cache_of_a_text_config_inside_another_is_off_too(tmp_path: Path) -> None:
    model = architectures.build("causal_lm", "gemma3")
    folder = save_checkpoint(model, tmp_path)
    spec = {"auto_class": f"transformers:{type(model).__name__}"}
    loaded = load(folder, {}, **spec).model
    assert loaded.config.get_text_config().use_cache is False


# --- gradients reach the adapter ----------------------------------------------------------------


@REENTRANT
def test_gradients_reach_every_adapter_weight(folder: Path, use_reentrant: bool) -> None:
    result = load(folder, {"use_reentrant": use_reentrant}, lora=LORA)
    trainable = {name for name, p in result.model.named_parameters() if p.requires_grad}
    assert set(gradients(result.model)) == trainable
    assert all("lora_" in name for name in trainable)
    variant = "reentrant" if use_reentrant else "non-reentrant"
    assert notes(result.plan) == [f"{variant}, with input gradients"]
    assert result.report.facts["gradient_checkpointing"]["input_gradients"] is True


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.refused_late  # a plugin against another
def test_an_adapter_whose_inputs_require_no_gradients_fails_the_audit(folder: Path) -> None:
    """What happens silently where checkpointing is reentrant and nobody sees to the inputs."""

    class Forgetful:
        name = "forgetful"
        after = ("lora",)

        @llmload.hookimpl
        def wrap_adapter(self, ctx: llmload.LoadContext, model: Any) -> Any:
            wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"]))
            for module in wrapped.modules():
                if isinstance(module, nn.Embedding):
                    module._forward_hooks.clear()
            return wrapped

    registry = llmload.create_registry([Forgetful()])
    spec = {"model": str(folder), "gradient_checkpointing": {"use_reentrant": True}}
    with pytest.raises(llmload.AuditError) as refused:
        llmload.load(spec, registry=registry)
    assert str(refused.value) == (
        "plugin 'gradient_checkpointing': no gradient reaches the 8 trainable parameters in the"
        " checkpointed layers. A plugin after `gradient_checkpointing` changed it; report this to"
        " its makers."
    )


def test_input_gradients_are_asked_for_where_transformers_does_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so for models that take ``input_ids``; transformers 4.51.3 only for its own PEFT."""
    monkeypatch.setattr(LlamaForCausalLM, "main_input_name", "features")
    model = load(folder, {"use_reentrant": True}).model.requires_grad_(False)
    assert model.train()(input_ids=IDS).logits.requires_grad


def test_gradients_reach_the_adapters_of_encoder_and_decoder(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "t5", "t5", auto_class="seq2seq_lm")
    lora = {"r": 2, "target_modules": ["q", "v"]}
    section = {"use_reentrant": True}
    model = load(folder, section, auto_class="seq2seq_lm", lora=lora).model
    assert set(gradients(model)) == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_adapter_learns_what_it_learns_in_trls_order(folder: Path) -> None:
    """TRL: the adapter, then input gradients, then checkpointing, turned on by the Trainer."""
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    theirs = get_peft_model(theirs, LoraConfig(**LORA))
    theirs.enable_input_require_grads()
    installed_transformers().enable_checkpointing(
        theirs, {"use_reentrant": True}, every_n_layers=1, offload=False
    )
    ours = load(folder, {"use_reentrant": True}, lora=LORA).model
    theirs.load_state_dict(ours.state_dict())
    found, expected = gradients(ours), gradients(theirs)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_reentrant_forward_of_a_frozen_model_has_input_gradients(folder: Path) -> None:
    model = load(folder, {"use_reentrant": True}).model.requires_grad_(False)
    assert model.train()(input_ids=IDS).logits.requires_grad


# --- what is refused ----------------------------------------------------------------------------


def test_an_architecture_without_support_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = save_checkpoint(architectures.build("causal_lm", "jetmoe"), tmp_path)
    plan = llmload.plan({"model": str(folder), "gradient_checkpointing": {}})
    assert [str(problem) for problem in plan.errors] == [
        "gradient_checkpointing: JetMoeForCausalLM does not support gradient checkpointing. Remove"
        " the section `gradient_checkpointing`."
    ]


@needs_transformers_5
@pytest.mark.skipif(_has_accelerator(), reason="offloading works here")
def test_offloading_without_an_accelerator_is_an_error(folder: Path) -> None:
    plan = llmload.plan({"model": str(folder), "gradient_checkpointing": {"offload": True}})
    assert [str(problem) for problem in plan.errors] == [
        "gradient_checkpointing.offload: there is no accelerator here from which to move"
        " activations to the host. Remove the key."
    ]


def test_what_an_older_transformers_does_not_know_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = installed_transformers()
    monkeypatch.setattr(transformers, "checkpoints_selectively", lambda: False)
    monkeypatch.setattr(transformers, "enable_checkpointing", lambda *args, **kwargs: None)
    section = {"every_n_layers": 2, "offload": False}
    plan = llmload.plan({"model": str(folder), "gradient_checkpointing": section})
    assert [str(problem) for problem in plan.errors] == [
        "gradient_checkpointing.every_n_layers: the installed transformers does not know"
        " 'every_n_layers'. Remove the key, or install transformers 5.23 or newer.",
        "gradient_checkpointing.offload: the installed transformers does not know 'offload'."
        " Remove the key, or install transformers 5.23 or newer.",
    ]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"use_reentrant": True, "determinism_check": "none"},
            "gradient_checkpointing: `determinism_check` has no effect with `use_reentrant: true`."
            " Remove it, or set `use_reentrant: false`.",
        ),
        (
            {"every_n_layers": 0},
            "gradient_checkpointing.every_n_layers: must be 1 or more, found 0",
        ),
        (
            {"reentrant": True},
            "gradient_checkpointing.reentrant: unknown key. Did you mean 'use_reentrant'?",
        ),
    ],
)
def test_a_wrong_section_is_refused(folder: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(llmload.SpecError) as refused:
        llmload.plan({"model": str(folder), "gradient_checkpointing": section})
    assert str(refused.value) == message


def test_checkpointing_that_a_later_plugin_turns_off_is_refused_by_the_plan(folder: Path) -> None:
    class Meddler:
        name = "meddler"
        after = ("gradient_checkpointing",)

        @llmload.hookimpl
        def post_load(self, ctx: llmload.LoadContext, model: Any) -> Any:
            for module in model.modules():
                module.gradient_checkpointing = False
            return model

    registry = llmload.create_registry([Meddler()])
    spec = {"model": str(folder), "gradient_checkpointing": {}}
    with pytest.raises(llmload.PlanError) as refused:
        llmload.load(spec, registry=registry)
    assert str(refused.value) == (
        f"plugin 'gradient_checkpointing': {5 if IS_MODERN else 1} modules were to checkpoint with"
        f" {GradientCheckpointingSection().torch_options()}, 0 of them do. A plugin after"
        " `gradient_checkpointing` changed it; report this to its makers."
    )


def notes(plan: llmload.Plan) -> list[str]:
    return next(step.notes for step in plan.steps if step.plugin == "gradient_checkpointing")


# --- every architecture -------------------------------------------------------------------------


UNSUPPORTED: dict[str, tuple[str, ...]] = {
    "causal_lm": (
        *("cpmant", "ctrl", "gpt_neox_japanese", "jetmoe", "openai-gpt", "reformer", "xlm"),
        "xlnet",
    ),
    "seq2seq_lm": ("fsmt", "granite_speech", "granite_speech_plus"),
    "base": (
        *("albert", "flaubert", "funnel", "ibert", "mpnet", "reformer", "squeezebert", "xlm"),
    ),
}
"""Types that say themselves that they do not support it, by kind."""

if not IS_MODERN:
    # starcoder2 says that it does, and never calls what would.
    for kind, further in {
        "causal_lm": ("starcoder2", "xlm-roberta-xl"),
        "seq2seq_lm": ("gptsan-japanese",),
        "base": ("mega", "mobilebert", "xlm-roberta-xl"),
    }.items():
        UNSUPPORTED[kind] += further

WRITES_INTO_EMBEDDINGS = ("blt", "git")
"""Types that change the embeddings' output in place, which torch refuses where it requires
gradients; transformers' own ``enable_input_require_grads`` breaks them, too."""

TYPES = architectures.tried()


@pytest.mark.filterwarnings("ignore")  # what transformers says of tiny configs is not the matter
@pytest.mark.parametrize(
    ("kind", "model_type"), [pair for pair in TYPES if pair[1] not in WRITES_INTO_EMBEDDINGS]
)
def test_gradients_pass_through_every_frozen_architecture_or_it_is_refused(
    kind: str, model_type: str
) -> None:
    """Reentrant, where a frozen model without input gradients lets none through."""
    model = architectures.build(kind, model_type)
    section = GradientCheckpointingSection(use_reentrant=True)
    ctx = context_of(model, section, wraps_adapter=True)
    found = [f for f in GradientCheckpointingPlugin().check(ctx) if isinstance(f, llmload.Problem)]
    assert bool(found) == (model_type in UNSUPPORTED[kind])
    if found:
        return
    GradientCheckpointingPlugin().post_load(ctx, model)
    if (kind, model_type) in architectures.NO_FORWARD:
        return
    model.requires_grad_(False).train()
    counted = count_checkpoints(model)
    output = model(**architectures.dummy_inputs(model, kind))
    (output[0] if kind == "base" else output.logits).sum().backward()
    assert counted[0] > 0


def count_checkpoints(model: nn.Module) -> list[int]:
    """Return a number that grows with each call of ``checkpoint`` by the model's modules."""
    counted = [0]
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None:

            def call(*args: Any, checkpoint: Any = checkpoint) -> Any:
                counted[0] += 1
                return checkpoint(*args)

            module._gradient_checkpointing_func = call  # type: ignore[assignment]
    return counted
