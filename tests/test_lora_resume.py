"""Resuming a saved adapter: every key, no other key, every shape, and the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import load, needs_peft, refusal, same_state, save, three_losses
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmload
from llmload.builtin.lora.saved import SavedAdapter
from llmload.testing import IDS, tiny_llama

ALL = {"r": 4, "target_modules": "all-linear", "lora_alpha": 16}
QV = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def trained(llama: Path, tmp_path: Path) -> Path:
    """A trained adapter on q_proj and v_proj."""
    model = load(llama, QV).model
    three_losses(model)
    return save(model, tmp_path / "adapter")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a saved adapter."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def configure(folder: Path, **fields: Any) -> None:
    """Change fields of a saved adapter's configuration."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


# --- the same adapter ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section",
    [
        QV,
        ALL,
        ALL | {"use_dora": True, "use_rslora": True},
        ALL | {"init_lora_weights": "pissa"},
        ALL | {"init_lora_weights": "olora"},
        QV | {"modules_to_save": ["lm_head"], "bias": "all"},
        {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
        ALL | {"rank_pattern": {"q_proj": 2}},
        QV | {"layer_replication": [[0, 2], [1, 2]]},
        pytest.param(QV | {"trainable_token_indices": [1, 5]}, marks=needs_peft("0.15.0")),
        pytest.param(ALL | {"kasa_config": {}}, marks=needs_peft("0.21.0")),
    ],
    ids=str,
)
def test_a_resumed_adapter_is_the_one_that_was_saved_and_trains_on_as_in_plain_peft(
    llama: Path, tmp_path: Path, section: dict[str, Any]
) -> None:
    model = load(llama, section).model
    three_losses(model)
    folder = save(model, tmp_path / "adapter")

    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(llama)
    theirs = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
    torch.manual_seed(5)
    result = load(llama, {"adapter": str(folder)})

    assert same_state(result.model, model)
    assert same_state(result.model, theirs)
    assert three_losses(result.model) == three_losses(theirs)
    assert result.plan.warnings == []


def test_the_plan_reads_no_weight_and_counts_what_is_resumed(
    llama: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = load(llama, {"adapter": str(trained)}).report
    monkeypatch.setattr(SavedAdapter, "read", lambda self: pytest.fail("weights were read"))
    plan = llmload.plan({"model": str(llama), "lora": {"adapter": str(trained)}})
    assert plan.errors == []
    assert plan.trainable == report.trainable
    assert plan.steps[-1].notes == [
        "LoRA of rank 4, alpha 8 / r, on q_proj, v_proj",
        f"resume the 8 tensors in '{trained}'",
    ]
    assert len(report.newly_initialised) == 8


def test_an_adapter_is_resumed_for_inference_under_another_name_and_dtype(
    llama: Path, trained: Path
) -> None:
    section = {
        "adapter": str(trained),
        "adapter_name": "judge",
        "adapter_dtype": "bfloat16",
        "inference_mode": True,
    }
    model = load(llama, section).model
    assert not any(p.requires_grad for p in model.parameters())
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["judge"].weight
    assert torch.equal(weight, load_file(trained / WEIGHTS)[Q0].bfloat16())


def test_embeddings_saved_with_the_adapter_replace_those_of_the_base(
    llama: Path, tmp_path: Path
) -> None:
    model = load(llama, {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}).model
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.base_layer.weight.mul_(2)
    folder = save(model, tmp_path / "adapter")
    result = load(llama, {"adapter": str(folder)})
    assert same_state(result.model, model)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    assert result.report.facts["lora"]["changed_base"] == [name]


def test_a_pissa_adapter_saved_as_plain_lora_is_resumed_on_the_unchanged_base(
    llama: Path, tmp_path: Path
) -> None:
    section = ALL | {"init_lora_weights": "pissa_niter_4", "lora_alpha": 4}
    model = load(llama, section).model
    start = tmp_path / "start"
    model.peft_config["default"].init_lora_weights = True
    save(model, start)
    model.peft_config["default"].init_lora_weights = "pissa_niter_4"
    three_losses(model)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(start))
    result = load(llama, {"adapter": str(tmp_path / "plain")})
    assert result.report.facts["lora"]["changed_base"] == []
    torch.testing.assert_close(
        result.model(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits
    )


# --- strict keys --------------------------------------------------------------------------------


def test_missing_keys_are_named(llama: Path, trained: Path) -> None:
    edit(trained, lambda tensors: tensors.pop(Q0))
    assert refusal(llama, {"adapter": str(trained)}) == (
        f"lora.adapter: the adapter in '{trained}' lacks '{Q0}'. Save it again, complete; or check"
        " that model and adapter belong together."
    )


def test_missing_modules_to_save_are_named(llama: Path, tmp_path: Path) -> None:
    folder = save(load(llama, QV | {"modules_to_save": ["lm_head"]}).model, tmp_path / "adapter")
    edit(folder, lambda tensors: tensors.pop("base_model.model.lm_head.weight"))
    assert refusal(llama, {"adapter": str(folder)}) == (
        f"lora.adapter: the adapter in '{folder}' lacks 'base_model.model.lm_head.weight'. Save it"
        " again, complete; or check that model and adapter belong together."
    )


def test_unexpected_keys_are_named(llama: Path, trained: Path) -> None:
    stray = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    edit(trained, lambda tensors: tensors.update({stray: torch.zeros(4, 16)}))
    assert refusal(llama, {"adapter": str(trained)}) == (
        f"lora.adapter: the model has no place for '{stray}' of the adapter in '{trained}'. Check"
        " that model and adapter belong together."
    )


def test_mis_shaped_keys_are_named(llama: Path, trained: Path) -> None:
    edit(trained, lambda tensors: tensors.update({Q0: torch.zeros(8, 16)}))
    assert refusal(llama, {"adapter": str(trained)}) == (
        f"lora.adapter: '{Q0}' has the shape [8, 16] in '{trained}' and [4, 16] in the model. Check"
        " that model and adapter belong together, and that the embeddings have the adapter's size."
    )


def test_an_adapter_with_other_embeddings_says_how_it_would_fit(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, vocab_size=51)
    section = QV | {"modules_to_save": ["embed_tokens", "lm_head"]}
    core: dict[str, Any] = {"tokenizer": {"add_tokens": ["<a>"]}, "embeddings": {}}
    made = load(folder, section, **core)
    adapter = save(made.model, tmp_path / "adapter")
    made.tokenizer.save_pretrained(adapter)
    message = refusal(folder, {"adapter": str(adapter)})
    assert (
        "Give the embeddings the adapter's size before it is resumed: name the tokenizer that was"
        " saved with it in `tokenizer: {name_or_path: ...}`, and write `embeddings: {}`, with the"
        " `pad_to_multiple_of` of its training, for 52 rows. Plain PEFT needs"
        " `resize_token_embeddings(52)` before it." in message
    )
    way_out: dict[str, Any] = {"tokenizer": {"name_or_path": str(adapter)}, "embeddings": {}}
    again = load(folder, {"adapter": str(adapter)}, **way_out)
    assert same_state(again.model, made.model)


def test_an_adapter_of_another_model_is_refused_with_every_fault(
    trained: Path, tmp_path: Path
) -> None:
    other = tiny_llama(tmp_path, name="other", num_hidden_layers=1, hidden_size=32)
    lines = refusal(other, {"adapter": str(trained)}).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("lora.adapter: the model has no place for ")
    assert lines[1].startswith(f"lora.adapter: '{Q0}' has the shape [4, 16] in ")


# --- the folder ---------------------------------------------------------------------------------


def test_a_folder_that_does_not_exist_is_refused(llama: Path) -> None:
    assert refusal(llama, {"adapter": "no/such/folder"}) == (
        "lora.adapter: the adapter folder 'no/such/folder' does not exist. Give a folder written by"
        " save_pretrained of a PeftModel."
    )


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_folder_without_one_of_its_files_is_refused(
    llama: Path, trained: Path, missing: str
) -> None:
    (trained / missing).unlink()
    assert refusal(llama, {"adapter": str(trained)}) == (
        f"lora.adapter: the adapter folder '{trained}' holds no {missing}. Give a folder written by"
        " save_pretrained of a PeftModel."
    )


def test_pickled_weights_are_never_opened(llama: Path, trained: Path) -> None:
    (trained / WEIGHTS).rename(trained / "adapter_model.bin")
    assert refusal(llama, {"adapter": str(trained)}) == (
        f"lora.adapter: the adapter's weights in '{trained}' are a pickle, which can run code when"
        " opened. Load it elsewhere with PEFT and save it again, which writes"
        " adapter_model.safetensors."
    )


def test_cut_off_weights_are_refused(llama: Path, trained: Path) -> None:
    whole = (trained / WEIGHTS).read_bytes()
    (trained / WEIGHTS).write_bytes(whole[:-4])
    assert refusal(llama, {"adapter": str(trained)}) == (
        f"{trained / WEIGHTS}: the file is cut off: expected {len(whole)} bytes, found"
        f" {len(whole) - 4}. Download or save the file again."
    )


def test_a_configuration_that_is_not_json_is_refused(llama: Path, trained: Path) -> None:
    (trained / CONFIG).write_text("{")
    assert refusal(llama, {"adapter": str(trained)}) == (
        f"{trained / CONFIG}: lora.adapter: adapter_config.json is not valid JSON: Expecting"
        " property name enclosed in double quotes: line 1 column 2 (char 1). Save or download the"
        " folder again."
    )
    (trained / CONFIG).write_text("[]")
    assert refusal(llama, {"adapter": str(trained)}) == (
        f"{trained / CONFIG}: lora.adapter: adapter_config.json is a JSON list, not an object."
        " Save or download the folder again."
    )


def test_an_adapter_of_another_kind_is_refused(llama: Path, trained: Path) -> None:
    configure(trained, peft_type="IA3")
    assert refusal(llama, {"adapter": str(trained)}) == (
        f"{trained / CONFIG}: lora.adapter: the adapter is of PEFT's type 'IA3', and the section"
        " `lora` resumes 'LORA'. Give the folder of a LoRA adapter."
    )


def test_a_setting_of_a_later_peft_is_refused_where_it_is_set_and_passed_over_where_not(
    llama: Path, trained: Path
) -> None:
    configure(trained, use_hexlora=False, hexlora_config=None)
    load(llama, {"adapter": str(trained)})
    configure(trained, use_hexlora=True, peft_version="1.3.0")
    assert refusal(llama, {"adapter": str(trained)}) == (
        f"{trained / CONFIG}: use_hexlora: the adapter was saved with a setting that is not known"
        " here, True. It was written by peft 1.3.0; use an llmload that knows it."
    )


def test_a_file_of_a_newer_peft_is_read_by_an_older_one_where_it_asks_for_nothing_new(
    llama: Path, trained: Path
) -> None:
    configure(trained, exclude_modules=None, use_qalora=False, qalora_group_size=16)
    load(llama, {"adapter": str(trained)})


def test_our_own_keys_in_an_adapters_configuration_are_not_obeyed(
    llama: Path, trained: Path
) -> None:
    configure(trained, adapter="/elsewhere", peft_version="0.21.2")
    assert refusal(llama, {"adapter": str(trained)}) == (
        f"{trained / CONFIG}: adapter: the adapter was saved with a setting that is not known here,"
        " '/elsewhere'. It was written by peft 0.21.2; use an llmload that knows it."
    )


def test_a_wrong_value_in_the_adapters_configuration_is_refused(llama: Path, trained: Path) -> None:
    configure(trained, r=0)
    assert refusal(llama, {"adapter": str(trained)}) == (
        f"{trained / CONFIG}: r: a LoRA of rank 0 has no parameters. Give a rank of 1 or more, or"
        " remove the section `lora` to load without an adapter."
    )


# --- the section beside the file ----------------------------------------------------------------


def test_a_section_that_says_the_same_is_accepted(llama: Path, tmp_path: Path) -> None:
    section = ALL | {"use_rslora": True, "modules_to_save": ["lm_head"]}
    model = load(llama, section).model
    folder = save(model, tmp_path / "adapter")
    assert same_state(load(llama, section | {"adapter": str(folder)}).model, model)


def test_a_section_that_contradicts_the_file_is_refused(llama: Path, trained: Path) -> None:
    section = {"adapter": str(trained), "r": 8, "use_dora": True, "target_modules": ["q_proj"]}
    lines = refusal(llama, section).splitlines()
    assert lines == [
        f"lora.r: the section says 8, and the adapter in '{trained}' says 4. Remove `r` from the"
        " section.",
        f"lora.target_modules: the section says ['q_proj'], and the adapter in '{trained}' says"
        f" {json.loads((trained / CONFIG).read_text())['target_modules']}. Remove `target_modules`"
        " from the section.",
        f"lora.use_dora: the section says True, and the adapter in '{trained}' says False. Remove"
        " `use_dora` from the section.",
    ]


def test_words_for_other_targets_are_refused_by_their_effect(llama: Path, trained: Path) -> None:
    accepted = {"adapter": str(trained), "target_modules": r".*\.(q|v)_proj"}
    load(llama, accepted)
    assert refusal(llama, accepted | {"target_modules": r".*\.q_proj"}) == (
        "lora.target_modules: the section asks for model.layers.*.self_attn.q_proj, and the adapter"
        f" in '{trained}' has model.layers.*.self_attn.q_proj, model.layers.*.self_attn.v_proj."
        " Remove `target_modules` and `exclude_modules` from the section."
    )


def test_base_weights_that_cannot_be_had_again_are_refused(llama: Path, tmp_path: Path) -> None:
    model = load(llama, ALL | {"init_lora_weights": "pissa_niter_4"}).model
    folder = save(model, tmp_path / "adapter")
    assert refusal(llama, {"adapter": str(folder)}) == (
        f"lora.adapter: the adapter in '{folder}' was made with 'pissa_niter_4', which changed the"
        " base weights in a way that cannot be repeated. Save it with"
        " `path_initial_model_for_weight_conversion`, which makes it a plain LoRA for the unchanged"
        " base."
    )


# --- the proof ----------------------------------------------------------------------------------


@pytest.mark.refused_late  # only the weights tell
def test_the_audit_finds_a_weight_that_is_not_the_files(
    llama: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmload.builtin.lora import resume

    def forgetful(model: Any, tensors: dict[str, torch.Tensor], adapter_name: str) -> None:
        del tensors[Q0]
        peft.set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)

    monkeypatch.setattr(resume, "set_peft_model_state_dict", forgetful)
    with pytest.raises(llmload.AuditError) as caught:
        load(llama, {"adapter": str(trained)})
    assert str(caught.value) == (
        f"lora.adapter: '{Q0}' differ from the adapter in '{trained}'. Report this with the plan"
        " and the versions of `llmload env`."
    )


@pytest.mark.parametrize(
    ("wrapped", "rule"),
    [
        ("module.base_model.model.", "ddp"),
        ("base_model.model.module.", "ddp"),
        ("base_model.model._orig_mod.", "compiled"),
        ("_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module.", "fsdp"),
        ("_forward_module.base_model.model.", "fabric"),
    ],
)
def test_rules_that_undo_wrappers_reach_an_adapter(
    llama: Path, trained: Path, wrapped: str, rule: str
) -> None:
    expected = load(llama, {"adapter": str(trained)}).model

    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("base_model.model.", wrapped, 1)] = tensors.pop(key)

    edit(trained, wrap)
    assert "the model has no place for" in refusal(llama, {"adapter": str(trained)})
    result = load(llama, {"adapter": str(trained)}, key_rules=[rule])
    assert same_state(result.model, expected)


# --- names that its file has and the model has not ------------------------------------------------


@pytest.mark.parametrize(
    "stale",
    [
        {"target_modules": ["q_proj", "query"]},
        {"rank_pattern": {"query": 4}},
        {"modules_to_save": ["score"]},
        {"target_parameters": ["experts.gate_up_proj"]},
    ],
    ids=lambda stale: next(iter(stale)),
)
@needs_peft("0.17.0")
def test_stale_names_of_a_file_are_not_refused_as_if_the_spec_had_them(
    stale: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    model = load(llama, {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}).model
    model.save_pretrained(tmp_path)
    configure(tmp_path, **stale)
    again = load(llama, {"adapter": str(tmp_path)}).model
    wanted = dict(model.named_parameters())
    assert all(torch.equal(p, wanted[name]) for name, p in again.named_parameters())


def test_a_file_of_whose_targets_the_model_has_none_is_told_as_the_files(
    llama: Path, tmp_path: Path
) -> None:
    load(llama, {"r": 2, "target_modules": ["q_proj"]}).model.save_pretrained(tmp_path)
    configure(tmp_path, target_modules=["query"])
    with pytest.raises(llmload.PlanError) as caught:
        load(llama, {"adapter": str(tmp_path)})
    assert str(caught.value) == (
        f"lora.adapter: the adapter in '{tmp_path}' is for modules called query, and"
        " LlamaForCausalLM has none of them. Check that model and adapter belong together."
    )
