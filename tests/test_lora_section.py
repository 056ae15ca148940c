"""The section `lora`: all of PEFT's LoraConfig by its own names, typed, and refused in one line."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
from adapters import needs_peft, refusal

import llmload
from llmload.builtin.lora.plugin import LoraPlugin
from llmload.builtin.lora.section import (
    FIELDS_SINCE,
    INITIALISATIONS,
    LEFT_TO_PEFT,
    OWN_FIELDS,
    LoraSection,
)
from llmload.host.distributions import version_of
from llmload.loading import planning
from llmload.testing import tiny_llama

LORA_FIELDS = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


# --- the fields ---------------------------------------------------------------------------------


def test_every_field_of_the_installed_lora_config_can_be_set_under_its_own_name() -> None:
    ours = LoraSection.model_fields.keys() - OWN_FIELDS
    assert LORA_FIELDS.keys() - LEFT_TO_PEFT <= ours
    # What is missing from the installed PEFT is known to have come later.
    assert ours - LORA_FIELDS.keys() <= FIELDS_SINCE.keys()


@needs_peft("0.21.0")
def test_no_field_is_invented() -> None:
    assert LoraSection.model_fields.keys() - OWN_FIELDS == LORA_FIELDS.keys() - LEFT_TO_PEFT


def test_defaults_are_pefts_own() -> None:
    ours, theirs = LoraSection(), peft.LoraConfig()
    differing = {
        name: (getattr(ours, name), getattr(theirs, name))
        for name in LORA_FIELDS.keys() - LEFT_TO_PEFT - {"runtime_config"}
        if getattr(ours, name) != getattr(theirs, name)
    }
    assert differing == {}
    assert ours.runtime_config == {}  # LoraRuntimeConfig(), which is made without arguments


def test_the_initialisations_are_pefts_own() -> None:
    documented = str(LORA_FIELDS["init_lora_weights"].type)
    for name, since in INITIALISATIONS.items():
        # lora_ga is accepted, and missing from the annotation.
        if _has(since) and name != "lora_ga":
            assert repr(name) in documented or f'"{name}"' in documented


def test_the_section_is_made_without_peft_or_torch() -> None:
    code = (
        "import sys; from llmload.builtin.lora.section import LoraSection;"
        " LoraSection(r=4, target_modules='all-linear', eva_config={'rho': 2.0});"
        " assert not {'torch', 'peft', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_only_what_is_given_is_handed_on() -> None:
    section = LoraSection.model_validate({"r": 4, "adapter_dtype": "base", "use_dora": False})
    assert section.given() == {"r": 4, "use_dora": False}


def _has(version: str) -> bool:
    return not needs_peft(version).args[0]


# --- values that no PEFT could use --------------------------------------------------------------

BAD_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": (
        {"r": 0},
        "lora.r: a LoRA of rank 0 has no parameters. Give a rank of 1 or more, or remove the"
        " section `lora` to load without an adapter.",
    ),
    "a negative rank": (
        {"r": -4},
        "lora.r: a LoRA of rank -4 has no parameters. Give a rank of 1 or more, or remove the"
        " section `lora` to load without an adapter.",
    ),
    "a rank of 0 in a pattern": (
        {"rank_pattern": {"q_proj": 0}},
        "lora.rank_pattern.q_proj: a LoRA of rank 0 has no parameters. Give a rank of 1 or more, or"
        " remove the section `lora` to load without an adapter.",
    ),
    "alpha 0": ({"lora_alpha": 0}, "lora.lora_alpha: must be greater than 0, found 0"),
    "dropout of everything": (
        {"lora_dropout": 1.0},
        "lora.lora_dropout: must be less than 1.0, found 1.0",
    ),
    "several names in one text": (
        {"target_modules": "q_proj,v_proj"},
        "lora.target_modules: 'q_proj,v_proj' is several names in one text, which is read as a"
        " regular expression. Write [q_proj, v_proj].",
    ),
    "a broken pattern": (
        {"target_modules": "q_proj("},
        "lora.target_modules: 'q_proj(' is not a regular expression: missing ), unterminated"
        " subpattern at position 6. To match the text as it stands, write 'q_proj\\\\('.",
    ),
    "a misspelt initialisation": (
        {"init_lora_weights": "pisa"},
        "lora.init_lora_weights: 'pisa' is not an initialisation of PEFT. Did you mean 'pissa'?",
    ),
    "an initialisation that does not exist": (
        {"init_lora_weights": "xavier"},
        "lora.init_lora_weights: 'xavier' is not an initialisation of PEFT. Write true, false,"
        " gaussian, olora, pissa, loftq, eva, corda, orthogonal, lora_ga, mica or pissa_niter_N.",
    ),
    "fast PiSSA without a number": (
        {"init_lora_weights": "pissa_niter_"},
        "lora.init_lora_weights: 'pissa_niter_' is not an initialisation of PEFT. Write true,"
        " false, gaussian, olora, pissa, loftq, eva, corda, orthogonal, lora_ga, mica or"
        " pissa_niter_N.",
    ),
    "a task type in small letters": (
        {"task_type": "causal_lm"},
        "lora.task_type: expected 'SEQ_CLS', 'SEQ_2_SEQ_LM', 'CAUSAL_LM', 'TOKEN_CLS',"
        " 'QUESTION_ANS' or 'FEATURE_EXTRACTION', found 'causal_lm'",
    ),
    "an adapter name with a dot": (
        {"adapter_name": "my.adapter"},
        "lora.adapter_name: must match the regular expression ^[^.\\s]+$, found 'my.adapter'",
    ),
    "two sources of configuration": (
        {"adapter": "out", "lora_config": "lora_config.json"},
        "lora: `adapter` and `lora_config` both say what the adapter is like. Remove `lora_config`:"
        " a saved adapter has its own configuration.",
    ),
    "two choices for tied weights": (
        {"ensure_weight_tying": True, "tied_weights": "untie"},
        "lora: `ensure_weight_tying` and `tied_weights: untie` contradict each other. Keep one of"
        " them.",
    ),
    "an unknown key": (
        {"lora_r": 4},
        "lora.lora_r: unknown key, known from TRL and axolotl. Write `lora: {r: 4}`.",
    ),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_value_that_cannot_be_is_refused_by_the_section(llama: Path, case: str) -> None:
    section, message = BAD_VALUES[case]
    assert refusal(llama, section) == message


# --- what PEFT would refuse, or need ------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key of a nested configuration": (
        {"loftq_config": {"loftq_bitz": 4}},
        "lora.loftq_config.loftq_bitz: unknown key. Did you mean 'loftq_bits'?",
    ),
    "an unknown key of the runtime configuration": (
        {"runtime_config": {"offload": True}},
        "lora.runtime_config.offload: unknown key. Known keys are: ephemeral_gpu_offload.",
    ),
    "DoRA with Megatron": (
        {"use_dora": True, "megatron_config": {"hidden_size": 16}},
        "lora: PEFT refuses this adapter: DoRA does not support megatron_core, please set"
        " `use_dora=False`. Change what it names.",
    ),
}
REFUSED_BY_NEWER = {
    "a value of a nested configuration": (
        "0.14.0",
        {"init_lora_weights": "eva", "eva_config": {"rho": 0.5}},
        "lora: PEFT refuses this adapter: `rho` must be >= 1.0. Change what it names.",
    ),
    "a biased B with DoRA": (
        "0.14.0",
        {"lora_bias": True, "use_dora": True},
        "lora: PEFT refuses this adapter: The argument lora_bias=True is not supported for DoRA,"
        " please pass use_dora=False. Change what it names.",
    ),
    "CorDA without covariances": (
        "0.15.0",
        {"init_lora_weights": "corda", "corda_config": {"covariance_file": "none.pt"}},
        "lora.init_lora_weights: 'corda' starts from covariances of activations, and `corda_config`"
        " names no file that holds them. Make one with peft's preprocess_corda, and name it as"
        " `covariance_file` or `cache_file` in `corda_config`.",
    ),
    "an odd rank for orthogonal": (
        "0.16.0",
        {"init_lora_weights": "orthogonal", "r": 3},
        "lora: PEFT refuses this adapter: Orthogonal initialization requires the LoRA rank to be"
        " even, got 3 instead. Change what it names.",
    ),
    "Arrow": (
        "0.18.0",
        {"arrow_config": {"top_k": 2}},
        "lora.arrow_config: Arrow routes between adapters that are there already, and this makes"
        " one. Load the base model without `lora`, and call peft's create_arrow_model.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_would_refuse_is_refused_in_the_plan(llama: Path, case: str) -> None:
    section, message = REFUSED[case]
    assert refusal(llama, section) == message


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=needs_peft(since)) for c, (since, *_) in REFUSED_BY_NEWER.items()],
)
def test_what_a_newer_peft_would_refuse_is_refused_in_the_plan(llama: Path, case: str) -> None:
    _, section, message = REFUSED_BY_NEWER[case]
    assert refusal(llama, section) == message


def _warnings(folder: Path, section: dict[str, Any]) -> list[str]:
    return [str(w) for w in llmload.plan({"model": str(folder), "lora": section}).warnings]


@needs_peft("0.14.0")
def test_what_peft_warns_of_its_settings_is_a_warning_of_the_plan(llama: Path) -> None:
    assert _warnings(llama, {"loftq_config": {"loftq_bits": 4}}) == [
        "lora: PEFT warns: `loftq_config` specified but will be ignored when `init_lora_weights` is"
        " not 'loftq'"
    ]


@needs_peft("0.14.0")
def test_an_initialisation_that_waits_for_data_is_a_warning_of_the_plan(llama: Path) -> None:
    assert _warnings(llama, {"init_lora_weights": "eva", "eva_config": {}}) == [
        "lora.init_lora_weights: 'eva' starts from data: until then, the adapter starts at random."
        " Call peft's initialize_lora_eva_weights(result.model, batches) before training."
    ]


@pytest.mark.refused_late  # a plugin may compute them of the weights that are loaded
@needs_peft("0.19.0")
def test_lora_ga_without_gradients_does_not_become_something_else(llama: Path) -> None:
    section = {"init_lora_weights": "lora_ga", "lora_ga_config": {}}
    assert _warnings(llama, section) == [
        "lora.init_lora_weights: 'lora_ga' starts from gradients, which a spec cannot make. Let a"
        " plugin's post_load call peft's preprocess_loraga."
    ]
    with pytest.raises(llmload.RequestError) as caught:
        llmload.load({"model": str(llama), "lora": section})
    assert str(caught.value) == (
        "lora.init_lora_weights: no layer carries the gradients that 'lora_ga' starts from. Let a"
        " plugin's post_load call peft's preprocess_loraga."
    )


def test_loftq_without_a_gpu_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # PEFT asks only whether scipy could be imported.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    section = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}
    assert refusal(llama, section) == (
        "lora.init_lora_weights: PEFT computes 'loftq' on a GPU, and there is none. Use pissa or"
        " olora, or load where there is a GPU."
    )


def test_a_missing_package_is_told_in_pefts_words(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    section = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}
    assert refusal(llama, section) == (
        "lora: PEFT refuses this adapter: The required package 'scipy' is not installed. Please"
        " install it to continue"
    )


# --- older PEFT ---------------------------------------------------------------------------------


def test_a_field_that_the_installed_peft_lacks_is_an_error_with_the_version_that_has_it(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.LoraConfig", _old_config())
    monkeypatch.setattr("llmload.builtin.lora.request.version_of", lambda name: "0.13.2")
    section = {
        "r": 4,
        "target_parameters": ["experts.up_proj"],
        "init_lora_weights": "orthogonal",
        "use_bdlora": {"nblocks": 2},
    }
    assert refusal(llama, section).splitlines() == [
        "lora.target_parameters: the field 'target_parameters' came with peft 0.17.0, and peft"
        " 0.13.2 is installed. Install it with `pip install 'peft>=0.17.0'`, or remove the key.",
        "lora.use_bdlora: the field 'use_bdlora' came with peft 0.19.0, and peft 0.13.2 is"
        " installed. Install it with `pip install 'peft>=0.19.0'`, or remove the key.",
        "lora.init_lora_weights: the initialisation 'orthogonal' came with peft 0.16.0, and peft"
        " 0.13.2 is installed. Install it with `pip install 'peft>=0.16.0'`, or remove the key.",
    ]


def _old_config() -> type:
    """Return a LoraConfig with the fields of peft 0.13.2."""
    kept = [
        (name, field.type, field) for name, field in LORA_FIELDS.items() if name not in FIELDS_SINCE
    ]
    return dataclasses.make_dataclass("LoraConfig", kept)


def test_a_peft_that_is_too_old_or_missing_is_a_problem_of_the_plan(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        planning, "version_of", lambda name: "0.12.0" if name == "peft" else version_of(name)
    )
    assert refusal(llama, {"r": 4}) == (
        "lora: the plugin needs peft>=0.13.2, and 0.12.0 is installed. Install it with `pip install"
        " 'peft>=0.13.2'`."
    )


# --- conflicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "conflicts"),
    [
        (True, False),
        ("gaussian", False),
        ("olora", False),  # dequantises and quantises again
        ("pissa", True),
        ("pissa_niter_4", True),
        ("loftq", True),
        ("corda", True),
        ("mica", True),
        ("orthogonal", True),
    ],
)
def test_initialisations_that_need_plain_weights_conflict_with_kbit(
    start: bool | str, conflicts: bool
) -> None:
    section = LoraSection(init_lora_weights=start)
    found = []
    for conflict in LoraPlugin.conflicts:
        assert conflict.ability == "quantisation"
        assert conflict.when is not None
        found.append(conflict.when(section, object()))
    assert any(found) is conflicts
