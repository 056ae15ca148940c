"""Adapters on tied embeddings: never without a choice, and every choice does what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import load, needs_peft, refusal, save, three_losses
from transformers import AutoModelForCausalLM

import llmload
from llmload.testing import IDS, tiny_checkpoint, tiny_llama

EMBEDDING = {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}
BOTH = {"r": 4, "target_modules": ["embed_tokens", "lm_head"]}
HEAD = {"r": 4, "target_modules": ["lm_head"]}
COPY = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}

together = needs_peft("0.18.0")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def tied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tied"), tied=True, dtype=request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tied"), tied=True)


# --- a choice is required -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "reached", "others"),
    [
        (EMBEDDING, "model.embed_tokens", "'lm_head'"),
        (HEAD, "lm_head", "'model.embed_tokens'"),
        (BOTH, "model.embed_tokens", "'lm_head'"),
        (COPY, "lm_head", "'model.embed_tokens'"),
    ],
)
@together
def test_reaching_a_tied_weight_needs_a_choice(
    llama: Path, section: dict[str, Any], reached: str, others: str
) -> None:
    assert refusal(llama, section) == (
        f"lora.tied_weights: the adapter reaches '{reached}', whose weight is also that of"
        f" {others}. Choose `ensure_weight_tying: true` for one adapter for all of them,"
        " `tied_weights: separate` to adapt only what is named, or `tied_weights: untie` to give"
        " each a weight of its own."
    )


@together
def test_the_choice_is_asked_for_by_all_names_of_a_weight(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "t5", "t5", auto_class="seq2seq_lm")
    message = refusal(folder, {"target_modules": ["shared"]}, auto_class="seq2seq_lm")
    assert message.startswith("lora.tied_weights: the adapter reaches 'shared', whose weight is")
    assert "'lm_head'" in message


@pytest.mark.parametrize(
    "section",
    [
        {"r": 4, "target_modules": "all-linear"},  # leaves the head out
        pytest.param(
            {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [1]},
            marks=needs_peft("0.15.0"),  # ties by itself
        ),
    ],
)
def test_no_choice_is_needed_where_no_tied_weight_is_reached(
    llama: Path, section: dict[str, Any]
) -> None:
    facts = load(llama, section).report.facts["lora"]
    assert (facts["tied"], facts["untied"]) == ([], [])


def test_an_untied_model_needs_no_choice(tmp_path: Path) -> None:
    assert load(tiny_llama(tmp_path), BOTH).report.facts["lora"]["tied"] == []


# --- one adapter for all ------------------------------------------------------------------------


@together
@pytest.mark.parametrize("section", [BOTH, HEAD, EMBEDDING])
def test_tied_adapters_share_their_weights_through_training(
    tied: Path, section: dict[str, Any]
) -> None:
    result = load(tied, section | {"ensure_weight_tying": True})
    base = result.model.get_base_model()
    head, embedding = base.lm_head, base.model.embed_tokens
    three_losses(result.model)

    assert result.report.facts["lora"]["tied"] == ["model.embed_tokens", "lm_head"]
    assert torch.equal(head.lora_A["default"].weight, embedding.lora_embedding_B["default"].t())
    assert torch.equal(head.lora_B["default"].weight, embedding.lora_embedding_A["default"].t())
    assert head.lora_B["default"].weight.any()


@together
@pytest.mark.parametrize("dtype", ["base", "float32", "float16"])
def test_tied_adapters_stay_tied_in_any_dtype(tied: Path, dtype: str) -> None:
    section = BOTH | {"ensure_weight_tying": True, "adapter_dtype": dtype}
    base = load(tied, section).model.get_base_model()
    assert (
        base.lm_head.lora_A["default"].weight.untyped_storage().data_ptr()
        == base.model.embed_tokens.lora_embedding_B["default"].untyped_storage().data_ptr()
    )


@together
def test_a_tied_copy_is_one_parameter(tied: Path) -> None:
    base = load(tied, COPY | {"ensure_weight_tying": True}).model.get_base_model()
    copies = [m.modules_to_save["default"].weight for m in (base.lm_head, base.model.embed_tokens)]
    assert copies[0] is copies[1]


@together
def test_names_that_peft_cannot_tie_are_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "gpt2", "gpt2")
    section = {"r": 4, "target_modules": ["wte"], "ensure_weight_tying": True}
    assert refusal(folder, section) == (
        "lora.ensure_weight_tying: PEFT cannot tie the adapter of 'transformer.wte' to 'lm_head':"
        " it ties what is called embed_tokens and lm_head. Choose `tied_weights: separate` to adapt"
        " only what is named, or `tied_weights: untie` to give each a weight of its own."
    )


@together
def test_the_plan_says_what_parts_tied_adapters(llama: Path) -> None:
    result = load(llama, BOTH | {"ensure_weight_tying": True})
    assert result.plan.steps[-1].notes[-1] == (
        "tied adapters share one storage: moving or casting the model parts them"
    )


# --- only what is named -------------------------------------------------------------------------


def test_separate_adapts_what_is_named_and_leaves_the_other_on_the_base(tied: Path) -> None:
    result = load(tied, EMBEDDING | {"tied_weights": "separate"})
    base = result.model.get_base_model()
    assert result.report.facts["lora"]["tied"] == ["model.embed_tokens"]
    assert base.lm_head.weight is base.model.embed_tokens.base_layer.weight
    assert type(base.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("choice", ["separate", pytest.param("together", marks=together)])
def test_an_initialisation_that_would_change_both_is_refused(llama: Path, choice: str) -> None:
    chosen = {"tied_weights": "separate"} if choice == "separate" else {"ensure_weight_tying": True}
    section = HEAD | chosen | {"init_lora_weights": "olora"}
    first, other = (
        ("lm_head", "model.embed_tokens")
        if choice == "separate"
        else ("model.embed_tokens", "lm_head")
    )
    assert refusal(llama, section) == (
        f"lora.init_lora_weights: 'olora' changes the weight of '{first}', which is also that of"
        f" '{other}'. Set `tied_weights: untie`, or exclude it from the targets."
    )


# --- a weight of its own ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section", [BOTH, COPY, HEAD | {"init_lora_weights": "pissa"}], ids=["LoRA", "copy", "PiSSA"]
)
def test_untied_the_merged_model_is_saved_and_loaded_with_two_weights(
    llama: Path, tmp_path: Path, section: dict[str, Any]
) -> None:
    result = load(llama, section | {"tied_weights": "untie"})
    model = result.model
    three_losses(model)
    expected = model.eval()(input_ids=IDS).logits
    model.merge_and_unload().save_pretrained(tmp_path / "merged")

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert again.config.tie_word_embeddings is False
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)
    torch.testing.assert_close(again(input_ids=IDS).logits, expected)


def test_untying_is_planned_reported_and_changes_no_value(tied: Path) -> None:
    result = load(tied, BOTH | {"tied_weights": "untie"})
    base = result.model.get_base_model()
    embedding, head = base.model.embed_tokens.base_layer.weight, base.lm_head.base_layer.weight
    assert embedding is not head
    assert torch.equal(embedding, head)
    assert result.report.facts["lora"]["untied"] == ["lm_head.weight"]
    assert result.plan.parameters == result.report.parameters
    assert "base_model.model.lm_head.base_layer.weight" in result.report.newly_initialised


def test_untying_is_the_loads_own_and_the_next_load_is_tied_again(llama: Path) -> None:
    load(llama, BOTH | {"tied_weights": "untie"})
    base = load(llama, {"r": 4, "target_modules": ["q_proj"]}).model.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert base.config.tie_word_embeddings is True


def test_an_untied_adapter_is_resumed_with_the_same_choice(llama: Path, tmp_path: Path) -> None:
    model = load(llama, BOTH | {"tied_weights": "untie"}).model
    three_losses(model)
    folder = save(model, tmp_path / "adapter")
    again = load(llama, {"adapter": str(folder), "tied_weights": "untie"}).model
    torch.testing.assert_close(
        again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits, rtol=0, atol=0
    )


# --- resumed or merged, an adapter of tied weights does what it did when it was trained -----------

TRAINED: dict[str, dict[str, Any]] = {
    "rows": {"trainable_token_indices": [5, 6]},
    "rows of the head": {"trainable_token_indices": {"lm_head": [5, 6]}},
    "rows of both": {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [5]}},
    "other rows of both": {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [7]}},
    "rows beside a layer": {
        "target_modules": ["q_proj", "embed_tokens"],
        "trainable_token_indices": {"lm_head": [5]},
    },
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "copied head": {"modules_to_save": ["lm_head"]},
    "copied embedding": {"modules_to_save": ["embed_tokens"]},
    "repeated layers": {"layer_replication": [[0, 2], [1, 2]]},
}
CHOICES: dict[str, dict[str, Any]] = {
    "no choice": {},
    "separate": {"tied_weights": "separate"},
    "untie": {"tied_weights": "untie"},
    "together": {"ensure_weight_tying": True},
}


@pytest.fixture(scope="module")
def adapters(
    llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[Path, torch.Tensor]]:
    """Train each adapter under each choice that is taken; returns its folder and the logits."""
    made = {}
    for name, section in TRAINED.items():
        for choice, keys in CHOICES.items():
            section = {"r": 2, "target_modules": ["q_proj"]} | section
            model = _unless_refused(llama, section | keys)
            if model is None:
                continue
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter += torch.randn(parameter.shape, generator=generator) / 4
            three_losses(model)
            folder = save(model, tmp_path_factory.mktemp("adapter"))
            made[name, choice] = folder, _logits(model)
    return made


def _unless_refused(folder: Path, section: dict[str, Any]) -> Any:
    """Return the model, or None where the plan names a key of the section that is in the way."""
    plan = llmload.plan({"model": str(folder), "lora": section})
    if plan.errors:
        assert all((problem.where or "").startswith("lora") for problem in plan.errors)
        return None
    return load(folder, section).model


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@together
@pytest.mark.parametrize("merge", [False, True], ids=["resumed", "merged"])
@pytest.mark.parametrize("name", TRAINED)
def test_adapters_of_tied_weights_do_what_they_did_or_are_refused(
    llama: Path,
    adapters: dict[tuple[str, str], tuple[Path, torch.Tensor]],
    name: str,
    merge: bool,
    tmp_path: Path,
) -> None:
    trained = {choice: made for (of, choice), made in adapters.items() if of == name}
    equal = set()
    for before, (folder, expected) in trained.items():
        for now, keys in CHOICES.items():
            model = _unless_refused(llama, {"adapter": str(folder), "merge": merge} | keys)
            if model is None:
                continue
            torch.testing.assert_close(_logits(model), expected, atol=2e-5, rtol=0)
            equal.add(before)
            if merge and now == "no choice":
                again = tmp_path / before
                model.save_pretrained(again)
                read = AutoModelForCausalLM.from_pretrained(again)
                torch.testing.assert_close(_logits(read), expected, atol=2e-5, rtol=0)
    # Whatever could be trained can be had again, in one way at least.
    assert equal == trained.keys()


@needs_peft("0.15.0")
def test_rows_that_were_trained_apart_stay_apart_without_being_told(
    llama: Path, adapters: dict[tuple[str, str], tuple[Path, torch.Tensor]]
) -> None:
    folder, expected = adapters["rows", "untie"]
    result = load(llama, {"adapter": str(folder)})
    torch.testing.assert_close(_logits(result.model), expected)
    assert result.report.facts["lora"]["untied"] == ["lm_head.weight"]
    assert refusal(llama, {"adapter": str(folder), "tied_weights": "separate"}) == (
        f"lora.tied_weights: the section says 'separate', and the adapter in {str(folder)!r} was"
        " trained with `tied_weights: untie`. Remove `tied_weights` from the section."
    )


@needs_peft("0.15.0")
def test_rows_that_were_trained_together_are_not_untied(
    llama: Path, adapters: dict[tuple[str, str], tuple[Path, torch.Tensor]]
) -> None:
    folder, _ = adapters["rows", "no choice"]
    assert refusal(llama, {"adapter": str(folder), "tied_weights": "untie"}) == (
        f"lora.tied_weights: `untie` is asked for, and the adapter in {str(folder)!r} was trained"
        " on one weight: its rows are those of 'lm_head' too. Remove `tied_weights` from the"
        " section."
    )


@needs_peft("0.15.0")
def test_rows_that_peft_ties_are_not_separate(llama: Path) -> None:
    section = {"target_modules": ["q_proj"], "trainable_token_indices": [5]}
    assert refusal(llama, section | {"tied_weights": "separate"}) == (
        "lora.tied_weights: `separate` is asked for, and PEFT trains the rows of"
        " `trainable_token_indices` in 'lm_head' too, whose weight is the embedding's. Remove"
        " `tied_weights` to train them together, or choose `untie`."
    )


@together
def test_rows_that_peft_leaves_apart_are_not_tied(llama: Path) -> None:
    section = {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5]}}
    assert refusal(llama, section | {"ensure_weight_tying": True}) == (
        "lora.ensure_weight_tying: PEFT trains rows of 'lm_head' alone: it ties only those of the"
        " input embedding to others. Name token ids without a module in"
        " `trainable_token_indices`, or choose `tied_weights`."
    )


@needs_peft("0.15.0")
def test_what_one_weight_cannot_hold_is_not_merged(
    llama: Path, adapters: dict[tuple[str, str], tuple[Path, torch.Tensor]]
) -> None:
    folder, _ = adapters["rows of the head", "no choice"]
    assert refusal(llama, {"adapter": str(folder), "merge": True}) == (
        "lora.merge: 'model.embed_tokens' and 'lm_head' have one weight, and the adapter changes it"
        " otherwise for each: no merged model with one weight is equal to what was trained. Set"
        " `tied_weights: untie`, so that each has a weight of its own."
    )


@together
def test_repeated_layers_are_copies_once_merged(
    llama: Path, adapters: dict[tuple[str, str], tuple[Path, torch.Tensor]]
) -> None:
    folder, _ = adapters["repeated layers", "no choice"]
    result = load(llama, {"adapter": str(folder), "merge": True})
    parameters = [*result.model.parameters()]
    assert len(parameters) == len({p.data_ptr() for p in parameters})
    copies = {n for n, why in result.report.newly_initialised.items() if "repeated" in why}
    assert "model.layers.2.mlp.up_proj.weight" in copies
    assert result.plan.parameters == result.report.parameters
