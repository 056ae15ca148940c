"""A LoRA load: bit-equal to plain PEFT, planned as it comes, reported by name, proven."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import peft
import pytest
import torch
from adapters import load, needs_peft, plain, refusal, same_state, save, three_losses
from stacks import IS_MODERN

import llmload
from llmload.builtin.lora.plugin import LoraPlugin
from llmload.testing import IDS, tiny_checkpoint, tiny_llama

ALL = {"r": 4, "target_modules": "all-linear"}
QV = {"r": 4, "target_modules": ["q_proj", "v_proj"]}

# Each is a section `lora` and, word for word, the arguments of peft.LoraConfig.
COMMON: dict[str, dict[str, Any]] = {
    "PEFT's default targets": {"r": 4},
    "all-linear": ALL,
    "a list of targets": QV,
    "a regular expression": {"r": 4, "target_modules": r".*\.self_attn\.(q|v)_proj"},
    "an embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "rsLoRA": ALL | {"use_rslora": True, "lora_alpha": 16},
    "DoRA": ALL | {"use_dora": True},
    "DoRA on an embedding": {"r": 4, "target_modules": ["embed_tokens"], "use_dora": True},
    "PiSSA": ALL | {"init_lora_weights": "pissa"},
    "fast PiSSA": ALL | {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": ALL | {"init_lora_weights": "olora"},
    "gaussian": ALL | {"init_lora_weights": "gaussian"},
    "random": ALL | {"init_lora_weights": False},
    "modules to save": QV | {"modules_to_save": ["embed_tokens", "lm_head"]},
    "rank and alpha patterns": ALL
    | {"rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.up_proj": 3}, "alpha_pattern": {"v_proj": 32}},
    "dropout": ALL | {"lora_dropout": 0.3},
    "all biases": ALL | {"bias": "all"},
    "one layer": QV | {"layers_to_transform": [1], "layers_pattern": "layers"},
    "replicated layers": QV | {"layer_replication": [[0, 2], [1, 2]]},
}
NEWER = [
    pytest.param(ALL | {"lora_bias": True}, id="biased B", marks=needs_peft("0.14.0")),
    pytest.param(
        ALL | {"exclude_modules": ["q_proj"]}, id="an exclusion", marks=needs_peft("0.14.0")
    ),
    pytest.param(
        QV | {"trainable_token_indices": [1, 5]}, id="trained tokens", marks=needs_peft("0.15.0")
    ),
    pytest.param(
        ALL | {"init_lora_weights": "orthogonal"}, id="orthogonal", marks=needs_peft("0.16.0")
    ),
    pytest.param(
        {"r": 4, "target_modules": [], "target_parameters": ["mlp.up_proj.weight"]},
        id="a parameter",
        marks=needs_peft("0.17.0"),
    ),
    pytest.param(ALL | {"alora_invocation_tokens": [1, 2]}, id="aLoRA", marks=needs_peft("0.18.0")),
    pytest.param(
        {
            "r": 4,
            "target_modules": ["q_proj", "o_proj"],
            "use_bdlora": {
                "target_modules_bd_a": ["o_proj"],
                "target_modules_bd_b": ["q_proj"],
                "nblocks": 2,
            },
        },
        id="BD-LoRA",
        marks=needs_peft("0.20.0"),
    ),
    pytest.param(ALL | {"init_lora_weights": "mica"}, id="MiCA", marks=needs_peft("0.20.0")),
    pytest.param(
        ALL | {"velora_config": {"num_groups": 2}}, id="VeLoRA", marks=needs_peft("0.20.0")
    ),
    pytest.param(ALL | {"kasa_config": {"beta": 0.1}}, id="KaSA", marks=needs_peft("0.21.0")),
]
SECTIONS = [*(pytest.param(section, id=name) for name, section in COMMON.items()), *NEWER]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def half_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


# --- as plain PEFT makes it ---------------------------------------------------------------------


@pytest.mark.parametrize("section", SECTIONS)
def test_the_same_seed_gives_the_weights_and_losses_of_plain_peft_and_the_plan_foresaw_them(
    half_llama: Path, section: dict[str, Any]
) -> None:
    torch.manual_seed(3)
    theirs = plain(half_llama, dtype=torch.bfloat16, **section)
    their_state = torch.get_rng_state()
    torch.manual_seed(3)
    result = load(half_llama, section)

    assert torch.equal(torch.get_rng_state(), their_state)
    assert type(result.model) is type(theirs)
    assert same_state(result.model, theirs)

    plan, report = result.plan, result.report
    assert plan.warnings == []
    assert (plan.parameters, plan.trainable) == (report.parameters, report.trainable)
    # Bytes too: the dtypes were foreseen, casts included.
    assert plan.parameter_bytes == report.parameter_bytes
    assert plan.trainable_parameters == [
        name for name, p in result.model.named_parameters() if p.requires_grad
    ]
    assert plan.facts["lora"]["targets"] == report.facts["lora"]["targets"]
    assert plan.new_parameters.keys() <= report.newly_initialised.keys()

    assert three_losses(result.model) == three_losses(theirs)
    assert same_state(result.model, theirs)


@pytest.mark.parametrize("asked", ["auto", "base", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("section", [ALL, ALL | {"use_dora": True}, COMMON["an embedding"]])
def test_the_adapter_has_the_dtype_asked_for(
    half_llama: Path, section: dict[str, Any], asked: str
) -> None:
    result = load(half_llama, section | {"adapter_dtype": asked})
    dtypes = {p.dtype for name, p in result.model.named_parameters() if "lora_" in name}
    base = {p.dtype for name, p in result.model.named_parameters() if "lora_" not in name}

    automatic = {"auto": torch.float32, "base": torch.bfloat16}
    assert dtypes == {automatic.get(asked) or getattr(torch, asked)}
    assert base == {torch.bfloat16}
    assert result.plan.parameter_bytes == result.report.parameter_bytes


def test_an_adapter_in_the_base_dtype_is_peft_without_autocast(half_llama: Path) -> None:
    torch.manual_seed(3)
    theirs = plain(half_llama, dtype=torch.bfloat16, autocast=False, **ALL)
    torch.manual_seed(3)
    ours = load(half_llama, ALL | {"adapter_dtype": "base"}).model
    assert same_state(ours, theirs)


# --- what comes out -----------------------------------------------------------------------------


def test_the_model_is_in_eval_mode_as_a_whole(llama: Path) -> None:
    model = load(llama, ALL | {"lora_dropout": 0.5}).model
    assert not any(module.training for module in model.modules())


def test_a_saved_adapter_is_what_plain_peft_loads(llama: Path, tmp_path: Path) -> None:
    model = load(llama, ALL | {"adapter_name": "mine"}).model
    three_losses(model)
    # PEFT saves an adapter that is not called "default" in a folder of its name.
    folder = save(model, tmp_path) / "mine"
    base = plain(llama).unload()
    again = peft.PeftModel.from_pretrained(base, folder, adapter_name="mine")
    assert same_state(model, again)
    assert peft.LoraConfig.from_pretrained(folder).base_model_name_or_path == str(llama)


def test_only_the_adapter_is_trainable_and_the_counts_are_pefts(llama: Path) -> None:
    result = load(llama, QV)
    trainable, everything = result.model.get_nb_trainable_parameters()
    assert (result.report.trainable, result.report.parameters) == (trainable, everything)
    assert all("lora_" in name for name in result.plan.trainable_parameters or ["nothing"])


def test_inference_mode_leaves_nothing_trainable(llama: Path) -> None:
    result = load(llama, QV | {"modules_to_save": ["lm_head"], "inference_mode": True})
    assert result.plan.trainable_parameters == []
    assert not any(p.requires_grad for p in result.model.parameters())


def test_new_parameters_are_accounted_for_by_name(llama: Path) -> None:
    result = load(llama, QV | {"modules_to_save": ["lm_head"]})
    assert set(result.report.newly_initialised) == {
        name
        for name, _ in result.model.named_parameters()
        if "lora_" in name or "modules_to_save" in name
    }


@pytest.mark.parametrize(
    ("model_type", "auto_class", "task", "wrapper"),
    [
        ("gpt2", "causal_lm", "CAUSAL_LM", "PeftModelForCausalLM"),
        ("t5", "seq2seq_lm", "SEQ_2_SEQ_LM", "PeftModelForSeq2SeqLM"),
        (
            "bert",
            "sequence_classification",
            "SEQ_CLS",
            "PeftModelForSequenceClassification",
        ),
        ("bert", "base", "FEATURE_EXTRACTION", "PeftModelForFeatureExtraction"),
    ],
)
def test_the_task_type_follows_from_the_auto_class(
    tmp_path: Path, model_type: str, auto_class: str, task: str, wrapper: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", model_type, auto_class=auto_class)
    model = load(folder, ALL, auto_class=auto_class).model
    assert model.peft_config["default"].task_type == task
    assert type(model).__name__ == wrapper


def test_a_task_type_that_is_given_wins_and_null_means_the_plain_wrapper(llama: Path) -> None:
    assert type(load(llama, QV | {"task_type": None}).model) is peft.PeftModel
    assert load(llama, QV).model.peft_config["default"].task_type == "CAUSAL_LM"


def test_a_class_named_by_its_path_gets_the_plain_wrapper(llama: Path) -> None:
    result = load(llama, QV, auto_class="transformers:LlamaForCausalLM")
    assert type(result.model) is peft.PeftModel


def test_a_classification_head_is_trained_with_the_adapter(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "bert", "bert", auto_class="sequence_classification")
    result = load(folder, ALL, auto_class="sequence_classification")
    head = [n for n in result.plan.trainable_parameters or [] if "classifier" in n]
    assert head == [
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.default.bias",
    ]


# --- what it is called in the plan and the report -----------------------------------------------


def test_targets_are_reported_by_name_and_what_is_left_out_by_kind(llama: Path) -> None:
    facts = llmload.plan({"model": str(llama), "lora": QV}).facts["lora"]
    assert facts == {
        "made_by": {},
        "targets": [
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.self_attn.v_proj",
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.self_attn.v_proj",
        ],
        "unmatched": [],
        "left_out": [
            "lm_head",
            "model.layers.*.mlp.down_proj",
            "model.layers.*.mlp.gate_proj",
            "model.layers.*.mlp.up_proj",
            "model.layers.*.self_attn.k_proj",
            "model.layers.*.self_attn.o_proj",
        ],
        "changed_base": [],
        "tied": [],
        "untied": [],
        "warnings": [],
    }


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"target_modules": ["q_porj", "v_proj"]},
            "lora.target_modules: no module of LlamaForCausalLM is called 'q_porj'. The nearest:"
            " q_proj, v_proj.",
        ),
        (
            {"modules_to_save": ["lm_head", "scores"]},
            "lora.modules_to_save: no module of LlamaForCausalLM is called 'scores'. Names are"
            " down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj,"
            " v_proj.",
        ),
        (
            {"rank_pattern": {"q_proj": 2, "k_prj": 2}},
            "lora.rank_pattern: no module of LlamaForCausalLM is called 'k_prj'. The nearest:"
            " k_proj, v_proj.",
        ),
        (
            {"alpha_pattern": {"q_proj": 2, "up_proj": 2}},
            "lora.alpha_pattern: no layer that gets an adapter is called 'up_proj'. Adapted are"
            " model.layers.*.self_attn.q_proj, model.layers.*.self_attn.v_proj.",
        ),
        (
            {"layers_to_transform": [0, 2]},
            "lora.layers_to_transform: no layer of LlamaForCausalLM that gets an adapter has the"
            " number 2. Numbers go from 0 on, one less than there are layers.",
        ),
    ],
)
def test_one_wrong_name_among_several_is_refused(
    llama: Path, keys: dict[str, Any], message: str
) -> None:
    assert refusal(llama, QV | keys) == message


@needs_peft("0.15.0")
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "no token id is named, so that no row would be trained. List ids of tokens, or"),
        ([-1], "-1 is no token id: PEFT would count from the last row, padding included. Give ids"),
        ([5, 5], "5 is named twice, and of two trained rows for one token one is lost. Name each"),
        ({}, "no module is named, so that no row would be trained. Write module: [ids], or"),
        ([5, 128], "the token id 128 has no row: 'the embedding' has 128. Give ids below that;"),
        ({"lm_head": [500]}, "the token id 500 has no row: 'lm_head' has 128. Give ids below"),
        ({"lm_head": []}, "no token id is named"),
    ],
)
def test_token_ids_without_a_row_are_refused(llama: Path, ids: Any, message: str) -> None:
    found = refusal(llama, QV | {"trainable_token_indices": ids})
    assert found.startswith("lora.trainable_token_indices")
    assert message in found


@needs_peft("0.15.0")
def test_rows_of_tokens_that_are_added_can_be_trained(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, vocab_size=51)
    section = QV | {"trainable_token_indices": [51]}
    core: dict[str, Any] = {"tokenizer": {"add_tokens": ["<y>"]}, "embeddings": {}}
    result = load(folder, section, **core)
    assert result.model.get_input_embeddings().weight.shape[0] == 52


@needs_peft("0.14.0")
def test_an_exclusion_of_what_is_not_there_is_reported_and_no_error(llama: Path) -> None:
    facts = load(llama, ALL | {"exclude_modules": ["vision_tower"]}).report.facts["lora"]
    assert facts["unmatched"] == ["exclude_modules: vision_tower"]
    assert facts["warnings"] == [
        "You have passed exclude_modules={'vision_tower'} but no modules were excluded. Please"
        " check that exclude_modules was set correctly."
    ]


RANKS_BEYOND = {
    "KaSA": (
        {"r": 8, "kasa_config": {}},
        "lora.r: KaSA drops as many singular values of a weight as the rank, here 8, and"
        " model.layers.*.self_attn.k_proj, model.layers.*.self_attn.v_proj cannot bear more than 7."
        " Write `r: 7` or less, or leave those layers out.",
    ),
    "MiCA": (
        {"r": 2, "rank_pattern": {"k_proj": 9}, "init_lora_weights": "mica"},
        "lora.r: 'mica' starts from as many singular values of a weight as the rank, here 9, and"
        " model.layers.*.self_attn.k_proj cannot bear more than 8. Write `r: 8` or less, or leave"
        " those layers out.",
    ),
}


@needs_peft("0.21.0")
@pytest.mark.parametrize("name", RANKS_BEYOND)
def test_a_rank_that_a_layer_cannot_bear_is_refused_by_the_plan(llama: Path, name: str) -> None:
    keys, message = RANKS_BEYOND[name]
    assert refusal(llama, ALL | keys) == message


@needs_peft("0.21.0")
@pytest.mark.parametrize("keys", [{"kasa_config": {}, "r": 7}, {"init_lora_weights": "mica"}])
def test_the_greatest_rank_that_a_layer_bears_is_loaded(llama: Path, keys: Any) -> None:
    assert load(llama, ALL | {"r": 8} | keys).model is not None


@pytest.mark.parametrize(
    "section",
    [
        COMMON["PiSSA"],
        COMMON["fast PiSSA"],
        COMMON["OLoRA"],
        pytest.param(ALL | {"kasa_config": {}}, marks=needs_peft("0.21.0")),
    ],
)
def test_base_weights_that_the_initialisation_changes_are_recorded(
    llama: Path, section: dict[str, Any]
) -> None:
    result = load(llama, section)
    before = dict(plain(llama, **ALL).named_parameters())
    changed = [
        name
        for name, parameter in result.model.named_parameters()
        if "lora_" not in name and not torch.equal(parameter, before[name])
    ]
    assert changed
    assert result.report.facts["lora"]["changed_base"] == changed
    assert result.plan.facts["lora"]["changed_base"] == changed


def _notes(folder: Path, section: dict[str, Any]) -> list[str]:
    plan = llmload.plan({"model": str(folder), "lora": section})
    return next(step.notes for step in plan.steps if step.plugin == "lora")


def test_the_plan_says_what_kind_of_adapter_comes(llama: Path) -> None:
    assert _notes(llama, {}) == ["LoRA of rank 8, alpha 8 / r, on PEFT's default targets"]
    assert _notes(llama, QV | {"lora_alpha": 16, "use_rslora": True}) == [
        "LoRA of rank 4, alpha 16 / sqrt(r), on q_proj, v_proj"
    ]
    assert _notes(llama, ALL | {"init_lora_weights": "pissa"}) == [
        "LoRA of rank 4, alpha 8 / r, on all-linear",
        "'pissa' changes the weights of the layers it adapts",
    ]


@needs_peft("0.17.0")
def test_the_plan_says_that_parameters_are_adapted(llama: Path) -> None:
    section = {"target_parameters": ["mlp.up_proj.weight"], "target_modules": None}
    assert _notes(llama, section)[0] == "LoRA of rank 8, alpha 8 / r, on target_parameters"


# --- requests that cannot be met ----------------------------------------------------------------

REFUSED = {
    "a name that no module has": (
        {"target_modules": ["wibble"]},
        "lora.target_modules: no module of LlamaForCausalLM is called 'wibble'. Names are"
        " down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj.",
    ),
    "misspelt names": (
        {"target_modules": ["q_prj", "v_prj"]},
        "lora.target_modules: no module of LlamaForCausalLM is called 'q_prj' or 'v_prj'. The"
        " nearest: q_proj, v_proj.",
    ),
    "a name where a pattern is read": (
        {"target_modules": "q_proj"},
        "lora.target_modules: no module of LlamaForCausalLM is called 'q_proj'. A text is a regular"
        " expression for the whole name; write [q_proj].",
    ),
    "a pattern that matches nothing": (
        {"target_modules": r"encoder\..*"},
        "lora.target_modules: no module of LlamaForCausalLM is called 'encoder\\\\..*'. A text"
        " is a regular expression for the whole name, such as 'model.layers.0.self_attn.q_proj'.",
    ),
    "a whole name that is wrong": (
        {"target_modules": "model.layer.0.self_attn.q_proj"},
        "lora.target_modules: no module of LlamaForCausalLM is called"
        " 'model.layer.0.self_attn.q_proj'. A text is a regular expression for the whole name, such"
        " as 'model.layers.0.self_attn.q_proj'.",
    ),
    "a name with dots that is wrong": (
        {"target_modules": ["self_atn.q_proj"]},
        "lora.target_modules: no module of LlamaForCausalLM is called 'self_atn.q_proj'. The"
        " nearest: self_attn.q_proj, self_attn.v_proj.",
    ),
    "an exclusion that is misspelt": (
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_porj"]},
        "lora.exclude_modules: no module of LlamaForCausalLM is called 'k_porj'. The nearest:"
        " k_proj, v_proj.",
    ),
    "modules to save that are not there": (
        QV | {"modules_to_save": ["lm_hed"]},
        "lora.modules_to_save: no module of LlamaForCausalLM is called 'lm_hed'. The nearest:"
        " lm_head.",
    ),
    "a rank pattern that matches nothing": (
        QV | {"rank_pattern": {"k_prj": 2}},
        "lora.rank_pattern: no module of LlamaForCausalLM is called 'k_prj'. The nearest:"
        " k_proj, v_proj.",
    ),
    "an alpha pattern that matches nothing": (
        QV | {"alpha_pattern": {"k_prj": 2}},
        "lora.alpha_pattern: no module of LlamaForCausalLM is called 'k_prj'. The nearest:"
        " k_proj, v_proj.",
    ),
    "a layer that is not there": (
        {"target_modules": ["q_proj"], "layers_to_transform": [7]},
        "lora: PEFT refuses this adapter: Target modules {'q_proj'} not found in the base model."
        " Please check the target modules and try again. Note: You specified 'layers_to_transform':"
        " [7]. Change what it names.",
    ),
    "a pattern together with layers": (
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        "lora: PEFT refuses this adapter: `layers_to_transform` cannot be used when"
        " `target_modules` is a str. Change what it names.",
    ),
}


if not hasattr(peft.LoraConfig, "exclude_modules"):  # which came with peft 0.14
    del REFUSED["an exclusion that is misspelt"]


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_met_is_refused_before_a_weight_is_read(llama: Path, case: str) -> None:
    section, message = REFUSED[case]
    if case == "a layer that is not there" and not hasattr(peft.LoraConfig, "eva_config"):
        message = message.replace(" Note: You specified 'layers_to_transform': [7].", "")
    assert refusal(llama, section) == message


@needs_peft("0.17.0")
def test_every_field_whose_names_match_nothing_is_told_at_once(llama: Path) -> None:
    section = {
        "target_modules": ["q_prj"],
        "target_parameters": ["up_proj.wait"],
        "trainable_token_indices": {"embed_token": [1]},
    }
    assert refusal(llama, section).splitlines() == [
        "lora.target_modules: no module of LlamaForCausalLM is called 'q_prj'. The nearest:"
        " q_proj, v_proj.",
        "lora.trainable_token_indices: no module of LlamaForCausalLM is called 'embed_token'."
        " The nearest: embed_tokens.",
        "lora.target_parameters: no parameter of LlamaForCausalLM is called 'up_proj.wait'. The"
        " nearest: up_proj.weight, v_proj.weight.",
    ]


def test_a_module_that_peft_cannot_adapt_is_named(llama: Path) -> None:
    message = refusal(llama, {"target_modules": ["mlp"]})
    assert message.startswith(
        "lora: PEFT refuses this adapter: Target module LlamaMLP( (gate_proj)"
    )
    assert " is not supported. Currently, only the following modules are supported: " in message


def test_a_model_type_without_default_targets_needs_them_named(tmp_path: Path) -> None:
    architectures.build("causal_lm", "olmo").save_pretrained(tmp_path)
    assert refusal(tmp_path, {}) == (
        "lora.target_modules: PEFT knows no default targets for the model type 'olmo'. Write"
        " `target_modules: all-linear`, or a list of names."
    )


# --- initialisations from data ------------------------------------------------------------------


@needs_peft("0.15.0")
def test_corda_starts_from_the_covariances_in_a_file(llama: Path, tmp_path: Path) -> None:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    file = str(tmp_path / "covariance.pt")
    options = {"covariance_file": file, "corda_method": "kpm"}
    section = QV | {"init_lora_weights": "corda", "corda_config": options}
    config = peft.LoraConfig(**QV, init_lora_weights="corda", corda_config=CordaConfig(**options))
    base = plain(llama, **QV).unload()
    preprocess_corda(base, config, run_model=lambda: base(input_ids=IDS[:1]))
    theirs = peft.get_peft_model(base, config)

    result = load(llama, section)
    assert len(result.report.facts["lora"]["changed_base"]) == 4
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(result.model.get_parameter(name), value)


@needs_peft("0.19.0")
def test_lora_ga_starts_from_gradients_that_a_plugin_gathered(llama: Path) -> None:
    class Gradients:
        name = "gradients"

        @llmload.hookimpl
        def post_load(self, ctx: llmload.LoadContext, model: Any) -> Any:
            if not ctx.rehearsing:
                loss = model(input_ids=IDS, labels=IDS).loss
                layers = [m for n, m in model.named_modules() if n.endswith(("q_proj", "v_proj"))]
                found = torch.autograd.grad(loss, [layer.weight for layer in layers])
                for layer, gradient in zip(layers, found, strict=True):
                    layer._peft_loraga_grad = gradient
            return model

    section = QV | {"init_lora_weights": "lora_ga", "lora_ga_config": {"scale": "unit"}}
    registry = llmload.create_registry([Gradients()])
    result = llmload.load({"model": str(llama), "lora": section}, registry=registry)
    assert len(result.report.facts["lora"]["changed_base"]) == 4
    assert result.plan.trainable == result.report.trainable


@needs_peft("0.20.0")
def test_what_peft_cannot_make_without_values_is_loaded_without_a_promise(llama: Path) -> None:
    result = load(llama, QV | {"monteclora_config": {}})
    assert [str(warning) for warning in result.plan.warnings] == [
        "the load could not be rehearsed on the meta device, so the plan promises no trainable"
        " parameters: plugin 'lora' (llmload 0.1.0) failed in wrap_adapter: NotImplementedError:"
        " PEFT cannot make MonteCLoRA on the meta device"
    ]
    assert result.plan.trainable_parameters is None
    assert any("monteclora" in name for name, _ in result.model.named_parameters())


# --- names of other days and places -------------------------------------------------------------


@needs_peft("0.19.0")
def test_targets_by_their_names_of_transformers_4_are_found_in_fused_experts(
    tmp_path: Path,
) -> None:
    architectures.build("causal_lm", "mixtral").save_pretrained(tmp_path)
    section = {"r": 2, "target_modules": ["q_proj", "w1", "w2", "w3"]}
    result = load(tmp_path, section)
    facts = result.report.facts["lora"]
    assert facts["unmatched"] == []
    assert "model.layers.0.mlp.experts" in facts["targets"]
    theirs = plain(tmp_path, **section)
    assert list(result.model.state_dict()) == list(theirs.state_dict())

    folder = save(result.model, tmp_path / "adapter")
    again = load(tmp_path, {"adapter": str(folder)})
    assert same_state(again.model, result.model)


def test_a_saved_adapter_names_the_hub_repository_and_revision_of_its_base(
    llama: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(llama, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text("0" * 40)
    hub = {"model": "org/tiny", "revision": "v1", "cache_dir": str(tmp_path / "hub")}

    config = llmload.load(hub | {"lora": QV}).model.peft_config["default"]
    assert (config.base_model_name_or_path, config.revision) == ("org/tiny", "v1")
    named = QV | {"base_model_name_or_path": "org/big", "revision": "main"}
    config = llmload.load(hub | {"lora": named}).model.peft_config["default"]
    assert (config.base_model_name_or_path, config.revision) == ("org/big", "main")


# --- the proof ----------------------------------------------------------------------------------


def _audit(llama: Path, section: dict[str, Any], spoil: Callable[[Any], object]) -> str:
    """Return what the audit says of a model that is spoiled after the adapter was put on."""

    class Spoiler(LoraPlugin):
        @llmload.hookimpl
        def wrap_adapter(self, ctx: llmload.LoadContext, model: Any) -> Any:
            wrapped = super().wrap_adapter(ctx, model)
            if not ctx.rehearsing:
                with torch.no_grad():
                    spoil(wrapped)
            return wrapped

    # A built-in plugin cannot be replaced: its class is patched for one load.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmload.builtin.lora.plugin.LoraPlugin", Spoiler)
        with pytest.raises(llmload.AuditError) as caught:
            load(llama, section)
    return str(caught.value)


REPORT = "Report this with the plan and the versions of `llmload env`."
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.refused_late  # a plugin that does otherwise than in the rehearsal
def test_the_audit_finds_factors_that_cannot_learn(llama: Path) -> None:
    message = _audit(llama, QV, lambda m: m.get_parameter(f"{FIRST}.lora_A.default.weight").zero_())
    assert message == (
        "lora.init_lora_weights: the adapter's factors of 'model.layers.0.self_attn.q_proj' are"
        f" zero, so that they cannot learn. {REPORT}"
    )


@pytest.mark.refused_late  # a plugin that does otherwise than in the rehearsal
def test_the_audit_finds_a_factor_that_should_not_be_zero(llama: Path) -> None:
    section = QV | {"init_lora_weights": "pissa"}
    message = _audit(
        llama, section, lambda m: m.get_parameter(f"{FIRST}.lora_B.default.weight").zero_()
    )
    assert message == (
        "lora.init_lora_weights: 'pissa' left factors of 'model.layers.0.self_attn.q_proj' at zero."
        f" {REPORT}"
    )


@pytest.mark.refused_late  # a plugin that does otherwise than in the rehearsal
def test_the_audit_finds_an_adapter_that_does_not_act(llama: Path) -> None:
    section = QV | {"inference_mode": True}
    message = _audit(llama, section, lambda m: m.get_submodule(FIRST).enable_adapters(False))
    assert message == (
        "lora.adapter_name: the adapter 'default' is not active in"
        f" 'model.layers.0.self_attn.q_proj'. {REPORT}"
    )


@pytest.mark.refused_late  # a plugin that does otherwise than in the rehearsal
def test_the_audit_finds_a_layer_that_lost_its_adapter(llama: Path) -> None:
    section = QV | {"inference_mode": True}
    message = _audit(llama, section, lambda m: m.get_submodule(FIRST).r.pop("default"))
    assert message == (
        "lora.target_modules: 'model.layers.0.self_attn.q_proj' lost the adapter. " + REPORT
    )


@needs_peft("0.18.0")
@pytest.mark.refused_late  # a plugin that does otherwise than in the rehearsal
def test_the_audit_finds_tied_adapters_that_part(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, tied=True)
    section = {"r": 4, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}

    def part(model: Any) -> None:
        factor = model.get_base_model().lm_head.lora_B["default"].weight
        factor.data = factor.data.clone()

    assert _audit(folder, section, part) == (
        "lora.ensure_weight_tying: the adapters of 'model.embed_tokens', 'lm_head' do not share"
        " their weights. Use `adapter_dtype: base`, or `tied_weights: untie`."
    )


@pytest.mark.refused_late  # a plugin that does otherwise than in the rehearsal
def test_a_plugin_that_wraps_first_is_found_by_the_plan(llama: Path) -> None:
    class Wrapper:
        name = "a_wrapper"
        before = ("lora",)

        @llmload.hookimpl
        def wrap_adapter(self, ctx: llmload.LoadContext, model: torch.nn.Module) -> torch.nn.Module:
            return model

    registry = llmload.create_registry([Wrapper()])
    with pytest.raises(llmload.PlanError) as caught:
        llmload.load({"model": str(llama), "lora": QV}, registry=registry)
    assert str(caught.value) == (
        "lora: the finished model is without the adapter. Another plugin wraps the model: remove"
        " its section or `lora`."
    )


@pytest.mark.skipif(not IS_MODERN, reason="the routers of 4.51 are of another class")
@pytest.mark.parametrize("model_type", ["llama4_text", "phimoe"])
def test_a_router_that_returns_more_than_a_tensor_is_refused_in_the_plan(
    model_type: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path, model_type)
    lora: dict[str, Any] = {"r": 2, "target_modules": "all-linear"}
    (error,) = llmload.plan({"model": str(folder), "lora": lora}).errors
    assert "return more than a tensor, and PEFT's layers take a tensor. Leave" in str(error)
    assert str(error).endswith("with `exclude_modules: [router]`.")
    lora["exclude_modules"] = ["router"]
    assert llmload.load({"model": str(folder), "lora": lora}).report.trainable > 0


# --- new tokens, whose rows somebody has to train -----------------------------------------------


def warnings_of(folder: Path, lora: dict[str, Any], **core: Any) -> list[str]:
    spec = {"model": str(folder), "lora": lora, "embeddings": {}, **core}
    plan = llmload.plan(spec)
    assert plan.errors == []
    return [str(problem) for problem in plan.warnings]


def test_new_tokens_in_a_frozen_embedding_are_a_warning_with_the_way_out(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, vocab_size=51)
    new = {"tokenizer": {"add_tokens": ["<a>", "<pad>"], "pad_token": "<pad>"}}
    assert warnings_of(folder, QV, **new) == [
        "lora.trainable_token_indices: the new tokens '<a>' have rows in a frozen embedding: no"
        " training will change what they mean. Write `trainable_token_indices: [51]` to train"
        " these rows, or name the embedding and the head in `modules_to_save`."
    ]
    assert warnings_of(folder, QV, trainable=False, **new)[:1] != []
    assert warnings_of(folder, QV | {"modules_to_save": ["embed_tokens", "lm_head"]}, **new) == []
    only_padding = {"tokenizer": {"add_tokens": ["<pad>"], "pad_token": "<pad>"}}
    assert warnings_of(folder, QV, **only_padding) == []


@needs_peft("0.15.0")
def test_new_tokens_whose_rows_are_trained_are_no_warning(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, vocab_size=51)
    new = {"tokenizer": {"add_tokens": ["<a>"]}}
    assert warnings_of(folder, QV | {"trainable_token_indices": [51]}, **new) == []


# --- experts in one parameter -------------------------------------------------------------------


@needs_peft("0.19.0")
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(
    "section",
    [
        {"target_modules": "all-linear"},
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ],
    ids=["all-linear", "named"],
)
def test_an_adapter_on_experts_is_merged(
    tmp_path: Path, model_type: str, section: dict[str, Any]
) -> None:
    folder = tmp_path / model_type
    architectures.build("causal_lm", model_type).save_pretrained(folder)
    model = load(folder, {"r": 2} | section).model.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) / 10
        expected = model(input_ids=IDS).logits
        adapter = {"adapter": str(save(model, tmp_path / "adapter")), "merge": True}
        result = load(folder, adapter)
        torch.testing.assert_close(
            result.model.eval()(input_ids=IDS).logits, expected, atol=1e-5, rtol=0
        )
    assert result.plan.parameters == result.report.parameters


@needs_peft("0.14.0")
def test_a_bias_that_the_base_has_no_place_for_is_not_merged(tmp_path: Path) -> None:
    llama = tiny_llama(tmp_path)
    model = load(llama, QV | {"lora_bias": True}).model
    adapter = {"adapter": str(save(model, tmp_path / "adapter")), "merge": True}
    assert refusal(llama, adapter).startswith(
        "lora.merge: PEFT refuses this adapter: Impossible to merge LoRA with `lora_bias=True`"
    )
