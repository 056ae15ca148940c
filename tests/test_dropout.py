"""Dropout is controlled completely, or the load fails and says where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
from stacks import IS_MODERN
from torch import nn
from transformers import LlamaForCausalLM, PretrainedConfig

import llmload
from llmload import hookimpl
from llmload.builtin.dropout import rates
from llmload.errors import AuditError, PlanError, SpecError
from llmload.host.registry import create_registry
from llmload.model import dry_run
from llmload.testing import edit_config, tiny_checkpoint, tiny_llama


class Stubborn(LlamaForCausalLM):
    """A model whose dropout is a literal in its code."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = nn.functional.dropout(outputs.logits, 0.25, self.training)
        return outputs


class Meddler:
    """A plugin that turns dropout on again when ``dropout`` has done its work."""

    name = "meddler"
    after = ("dropout",)

    @hookimpl
    def post_load(self, ctx: Any, model: nn.Module) -> nn.Module:
        if not ctx.rehearsing:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.5
        return model


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("dropout") / "gpt2", "gpt2")


def load(folder: Path, *plugins: object, **spec: Any) -> llmload.LoadResult:
    registry = create_registry(plugins, environ={})
    return llmload.load({"model": str(folder), **spec}, registry=registry)


def problems_of(error: pytest.ExceptionInfo[llmload.LlmloadError]) -> list[str]:
    return [problem.message for problem in error.value.problems]


# --- what is a rate -----------------------------------------------------------------------------

DROPOUT = (
    *("dropout", "attention_dropout", "hidden_dropout", "activation_dropout"),
    *("attn_pdrop", "resid_pdrop", "embd_pdrop", "emb_pdrop"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"),
    *("dropout_rate", "classifier_dropout", "summary_first_dropout", "moe_token_dropout"),
    *("attn_dropout_p", "dropout_p", "attn_drop_rate", "drop_rate", "gp_dropout_value"),
)
DISTURBANCE = (
    *("layerdrop", "encoder_layerdrop", "layer_drop", "drop_path_rate", "drop_path", "drop_prob"),
    *("path_dropout", "drop_connect_rate", "stochastic_depth_prob", "router_jitter_noise"),
    *("input_jitter_noise", "moe_jitter_eps", "mask_time_prob"),
)
NEITHER = ("drop_tokens", "dropped", "no_dropout_layers", "initializer_range", "norm_topk_prob")


@pytest.mark.parametrize("name", DROPOUT)
def test_every_spelling_of_a_dropout_rate_takes_the_rate_that_is_asked_for(name: str) -> None:
    (rate,) = rates.of_config(PretrainedConfig(**{name: 0.3}))
    assert (rate.under(0.0), rate.under(0.1)) == (0.0, 0.1)


@pytest.mark.parametrize("name", DISTURBANCE)
def test_skipped_layers_and_disturbed_inputs_are_switched_off_but_never_on(name: str) -> None:
    (rate,) = rates.of_config(PretrainedConfig(**{name: 0.3}))
    assert (rate.under(0.0), rate.under(0.1)) == (0.0, 0.3)


@pytest.mark.parametrize("name", NEITHER)
def test_a_name_that_merely_contains_the_word_is_left_alone(name: str) -> None:
    assert not list(rates.of_config(PretrainedConfig(**{name: 0.3})))


@pytest.mark.parametrize("value", [True, None, 7, "0.1", [0.1]])
def test_a_value_that_is_no_rate_is_left_alone(value: Any) -> None:
    assert not list(rates.of_config(PretrainedConfig(token_dropout=value)))


def test_configs_and_mappings_within_a_config_are_reached() -> None:
    inner = PretrainedConfig(attention_dropout=0.2)
    config = PretrainedConfig(text_config=inner, attn_config={"attn_pdrop": 0.3})
    assert {str(rate): rate.value for rate in rates.of_config(config)} == {
        "text_config.attention_dropout": 0.2,
        "attn_config.attn_pdrop": 0.3,
    }


def test_modules_attributes_and_copies_of_the_config_are_reached() -> None:
    model = nn.Module()
    model.drop = nn.Dropout2d(0.1)
    model.attention = nn.MultiheadAttention(4, 2, dropout=0.2)
    model.recurrent = nn.LSTM(4, 4, num_layers=2, dropout=0.3)
    model.attention.config = PretrainedConfig(hidden_dropout=0.4)
    assert {str(rate): rate.value for rate in rates.of_model(model)} == {
        "drop.p": 0.1,
        "attention.dropout": 0.2,
        "recurrent.dropout": 0.3,
        "attention.config.hidden_dropout": 0.4,
    }


# --- the plugin ---------------------------------------------------------------------------------


def test_dropout_is_off_in_the_config_and_in_the_modules(gpt2: Path) -> None:
    model = load(gpt2, dropout={}).model
    config = model.config
    assert (config.attn_pdrop, config.embd_pdrop, config.resid_pdrop) == (0.0, 0.0, 0.0)
    dropouts = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert dropouts == [0.0] * len(dropouts) != []


def test_any_other_rate_is_set_everywhere_and_leaves_layerdrop_alone(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "opt", dropout=0.3, attention_dropout=0.0, layerdrop=0.2)
    model = load(folder, dropout={"p": 0.05}).model
    config = model.config
    assert (config.dropout, config.attention_dropout, config.layerdrop) == (0.05, 0.05, 0.2)
    found = {(op.op, op.probability) for op in dry_run.probe(model).random_ops}
    assert found == {("aten.bernoulli_", 0.05), ("aten.rand", None)}


def test_the_four_fields_of_deepspeed_chat_are_among_those_set(tmp_path: Path) -> None:
    fields = ("dropout", "attention_dropout", "hidden_dropout", "activation_dropout")
    folder = edit_config(tiny_llama(tmp_path), **dict.fromkeys(fields, 0.3))
    config = load(folder, dropout={"p": 0.1}).model.config
    assert [getattr(config, field) for field in fields] == [0.1] * 4


def test_without_the_section_dropout_is_the_models_own(gpt2: Path) -> None:
    model = load(gpt2).model
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.1}


def test_the_plan_names_the_config_fields_that_change(gpt2: Path, tmp_path: Path) -> None:
    def notes(folder: Path) -> list[str]:
        plan = llmload.plan({"model": str(folder), "dropout": {}})
        return [note for step in plan.steps if step.plugin == "dropout" for note in step.notes]

    changed = "resid_pdrop (was 0.1), embd_pdrop (was 0.1), attn_pdrop (was 0.1)"
    assert notes(gpt2) == [
        f"sets dropout 0.0 in the config: {changed}, summary_first_dropout (was 0.1)"
    ]
    assert notes(tiny_llama(tmp_path)) == ["finds dropout 0.0 in the config already"]


def test_an_adapter_keeps_its_own_dropout(gpt2: Path) -> None:
    lora = {"r": 2, "target_modules": ["c_fc"], "fan_in_fan_out": True, "lora_dropout": 0.25}
    result = load(gpt2, dropout={}, lora=lora)
    found = dry_run.probe(result.model).random_ops
    assert {op.probability for op in found} == {0.25}
    assert all(".lora_dropout." in op.module for op in found)


def test_the_report_says_how_the_proof_was_made(gpt2: Path) -> None:
    assert load(gpt2, dropout={}).report.facts["dropout"] == {
        "p": 0.0,
        "proof": "meta",
        "reason": "",
    }


# --- what cannot be done --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"p": 1.0}, "dropout.p: must be less than 1.0, found 1.0"),
        ({"p": -0.1}, "dropout.p: must be 0.0 or more, found -0.1"),
        ({"p": "0.1"}, "dropout.p: expected a number, found '0.1'. Remove the quotes."),
        ({"p": float("nan")}, "dropout.p: nan is not a finite number. Write a number."),
        ({"rate": 0.1}, "dropout.rate: unknown key. Known keys are: p."),
    ],
)
def test_a_bad_rate_is_refused_before_anything_is_read(
    gpt2: Path, section: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError) as error:
        load(gpt2, dropout=section)
    assert str(error.value) == message


def test_a_literal_in_the_models_code_fails_the_plan_by_name(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    with pytest.raises(PlanError) as error:
        load(folder, auto_class=f"{__name__}:Stubborn", dropout={})
    assert problems_of(error) == [
        "dropout 0.0 is asked for, but model type 'llama' draws at rate 0.25 in training:"
        " aten.bernoulli_ in module '' (Stubborn)"
    ]
    assert error.value.problems[0].where == "dropout.p"
    assert error.value.problems[0].fix == (
        "No config field or module attribute reaches it: change the model, or accept it and remove"
        " `dropout` from the spec."
    )
    with pytest.raises(PlanError, match=r"dropout 0\.1 is asked for, .* at rate 0\.25"):
        load(folder, auto_class=f"{__name__}:Stubborn", dropout={"p": 0.1})
    load(folder, auto_class=f"{__name__}:Stubborn", dropout={"p": 0.25})


def test_randomness_that_is_no_dropout_fails_the_plan_by_name(tmp_path: Path) -> None:
    architectures.build("causal_lm", "reformer").save_pretrained(tmp_path)
    with pytest.raises(PlanError) as error:
        load(tmp_path, dropout={})
    assert problems_of(error) == [
        "dropout 0.0 is asked for, but model type 'reformer' draws in training:"
        " aten.randn in module 'reformer.encoder.layers.1.attention.self_attention'"
        " (LSHSelfAttention)"
    ]
    load(tmp_path, dropout={"p": 0.1})


@pytest.mark.refused_late  # a plugin that does otherwise than in the rehearsal
def test_dropout_that_comes_back_later_fails_the_audit_by_name(gpt2: Path) -> None:
    with pytest.raises(AuditError) as error:
        load(gpt2, Meddler(), dropout={})
    assert problems_of(error) == [
        "dropout 0.0 is asked for, but model type 'gpt2' draws at rate 0.5 in training:"
        " aten.bernoulli_ in module 'transformer.drop' (Dropout)",
        # attention passes the rate of its dropout module to a function
        "dropout 0.0 is asked for, but model type 'gpt2' draws at rate 0.5 in training:"
        " aten.bernoulli_ in module 'transformer.h.0.attn' (GPT2Attention)",
    ]


@pytest.mark.skipif(not IS_MODERN, reason="configs were not validated before 5")
def test_a_rate_that_the_config_refuses_is_a_problem_of_the_plan(tmp_path: Path) -> None:
    architectures.build("causal_lm", "mpt").save_pretrained(tmp_path)
    with pytest.raises(PlanError) as error:
        load(tmp_path, dropout={"p": 0.1})
    assert problems_of(error) == [
        "the config of 'mpt' refuses 0.1: TypeError: Field 'attn_pdrop' expected int, got float"
        " (value: 0.1)"
    ]
    assert error.value.problems[0].fix == "Choose a rate that the model allows."


@pytest.mark.refused_late  # a plugin that does otherwise than in the rehearsal
def test_where_no_forward_can_be_looked_at_the_modules_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "SMALL", 0)
    architectures.build("causal_lm", "jetmoe", attention_dropout=0.3).save_pretrained(tmp_path)
    assert load(tmp_path, dropout={}).report.facts["dropout"] == {
        "p": 0.0,
        "proof": "unavailable",
        "reason": "on meta tensors: NotImplementedError: Cannot copy out of meta tensor; no data!",
    }

    class SetsAnAttribute(Meddler):
        @hookimpl
        def post_load(self, ctx: Any, model: Any) -> nn.Module:
            if not ctx.rehearsing:
                model.model.layers[0].self_attention.attention_dropout = 0.5
            return model

    with pytest.raises(AuditError) as error:
        load(tmp_path, SetsAnAttribute(), dropout={})
    assert problems_of(error) == [
        "dropout 0.0 is asked for, but 'model.layers.0.self_attention.attention_dropout' of model"
        " type 'jetmoe' is 0.5"
    ]
    assert error.value.problems[0].fix == (
        "A plugin that runs after `dropout` sets it: remove that plugin, or `dropout`."
    )
