"""The tokenizer section: what it changes, what it refuses, and what it makes of the model's ids."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import IS_MODERN
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer, GenerationConfig, PreTrainedTokenizerBase

import llmload
from llmload.testing import edit_config, tiny_checkpoint, tiny_llama, tiny_tokenizer

BACKEND = "TokenizersBackend" if IS_MODERN else "PreTrainedTokenizerFast"
"""The class of a tokenizer that has none of its own; it was renamed with transformers 5."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 128 rows and 51 tokens without a pad token; eos is ``</s>``."""
    return tiny_llama(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the pad token ``<pad>``."""
    return tiny_llama(tmp_path_factory.mktemp("tokenizer"), name="padded", pad=True)


def load(folder: Path, **section: Any) -> llmload.LoadResult:
    return llmload.load({"model": str(folder), "tokenizer": section, "embeddings": {}})


def tokenizer(folder: Path, **section: Any) -> PreTrainedTokenizerBase:
    found = load(folder, **section).tokenizer
    assert found is not None
    return found


def problems(folder: Path, *, embeddings: bool = True, **section: Any) -> list[str]:
    spec = {"model": str(folder), "tokenizer": section} | ({"embeddings": {}} if embeddings else {})
    return [f"{p.severity} {p}" for p in llmload.plan(spec).problems]


def notes(plan: llmload.Plan) -> list[str]:
    return next(step.notes for step in plan.steps if step.plugin == "tokenizer")


# --- which tokenizer --------------------------------------------------------------------------


def test_every_load_gives_the_tokenizer_of_the_model_folder_as_it_is(folder: Path) -> None:
    result = llmload.load({"model": str(folder)})
    plain = AutoTokenizer.from_pretrained(folder)
    assert result.tokenizer is not None
    assert type(result.tokenizer) is type(plain)
    assert result.tokenizer.get_vocab() == plain.get_vocab()
    assert result.tokenizer.special_tokens_map == plain.special_tokens_map
    assert notes(result.plan) == [f"{BACKEND} with 51 tokens; pad token None, padding on the right"]


def test_a_folder_without_a_tokenizer_gives_none_and_a_note(folder: Path, tmp_path: Path) -> None:
    bare = without_tokenizer(folder, tmp_path)
    result = llmload.load({"model": str(bare)})
    assert result.tokenizer is None
    assert notes(result.plan) == ["no tokenizer: the folder holds no tokenizer files"]


def test_a_tokenizer_that_is_asked_for_and_is_not_there_is_an_error(
    folder: Path, tmp_path: Path
) -> None:
    bare = without_tokenizer(folder, tmp_path)
    assert problems(bare) == [
        f"error tokenizer.name_or_path: the folder {str(bare)!r} holds no tokenizer files. Name a"
        " folder or hub id that holds some in `tokenizer.name_or_path`, or remove the section"
        " `tokenizer`."
    ]


def test_a_tokenizer_config_without_a_vocabulary_is_an_error(tmp_path: Path) -> None:
    """transformers 5 makes of it a tokenizer that knows its special tokens and nothing else."""
    broken = tiny_checkpoint(tmp_path / "gpt2", "gpt2")
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    # transformers 4.51 fails, and cannot say which files it looked for.
    none_of = ": none of vocab.json, merges.txt, tokenizer.json" if IS_MODERN else ""
    assert problems(broken) == [
        f"error tokenizer.name_or_path: the folder {str(broken)!r} holds a tokenizer_config.json,"
        f" but no vocabulary{none_of}. Save or download it again, or name another in"
        " `tokenizer.name_or_path`."
    ]


def test_a_tokenizer_that_needs_no_vocabulary_file_is_taken(tmp_path: Path) -> None:
    bytewise = tiny_checkpoint(tmp_path / "t5", "t5", auto_class="seq2seq_lm", vocab_size=400)
    without_tokenizer_in_place(bytewise)
    ByT5Tokenizer().save_pretrained(bytewise)
    result = llmload.load({"model": str(bytewise), "auto_class": "seq2seq_lm"})
    assert isinstance(result.tokenizer, ByT5Tokenizer)


def test_a_damaged_tokenizer_file_is_an_error_that_says_where(folder: Path, tmp_path: Path) -> None:
    damaged = copied(folder, tmp_path)
    (damaged / "tokenizer.json").write_text("{")
    words = (
        "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
        if IS_MODERN
        else "EOF while parsing an object at line 1 column 1"
    )
    assert problems(damaged) == [
        f"error tokenizer.name_or_path: the tokenizer in {str(damaged)!r} cannot be loaded:"
        f" {words}. Save or"
        " download it again, or name another in `tokenizer.name_or_path`."
    ]


def test_code_that_comes_with_a_tokenizer_is_not_run(folder: Path, tmp_path: Path) -> None:
    hostile = copied(folder, tmp_path)
    canary = tmp_path / "canary"
    (hostile / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    settings = json.loads((hostile / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (hostile / "tokenizer_config.json").write_text(json.dumps(settings))
    problems(hostile)
    assert not canary.exists()


def test_another_folder_gives_the_tokenizer(folder: Path, padded: Path) -> None:
    assert tokenizer(folder, name_or_path=str(padded)).pad_token == "<pad>"


def test_ids_that_mean_another_token_than_in_the_models_own_tokenizer_are_a_warning(
    folder: Path, padded: Path
) -> None:
    assert problems(folder, name_or_path=str(padded)) == [
        "warning tokenizer.name_or_path: 48 of 52 ids mean another token than in the model's own"
        " tokenizer; id 3 is '<pad>', there 'the'. Use the tokenizer that the model was trained"
        " with, unless you retrain embeddings."
    ]


def test_a_tokenizer_folder_that_does_not_exist_is_an_error(folder: Path) -> None:
    assert problems(folder, name_or_path="./nowhere") == [
        "error tokenizer.name_or_path: the folder './nowhere' does not exist. Give a folder written"
        " by save_pretrained, or a hub id such as `org/name`."
    ]


def test_a_hub_tokenizer_that_cannot_be_had_is_an_error(folder: Path, tmp_path: Path) -> None:
    spec = {
        "model": str(folder),
        "tokenizer": {"name_or_path": "nobody/nothing"},
        "local_files_only": True,
        "cache_dir": str(tmp_path),
    }
    assert [str(problem) for problem in llmload.plan(spec).errors] == [
        "tokenizer.name_or_path: 'nobody/nothing' is not a folder, and the hub repository of that"
        " name is neither in the cache nor could it be fetched (`local_files_only` is set). Give a"
        " local folder, or fetch it beforehand with `hf download`."
    ]


def test_a_revision_needs_a_hub_id(folder: Path, padded: Path) -> None:
    assert problems(folder, revision="v2") == [
        "error tokenizer.revision: revision 'v2' was asked for without `tokenizer.name_or_path`."
        " Name the hub id of the tokenizer, or set the model's `revision`."
    ]
    assert problems(folder, revision="v2", name_or_path=str(padded)) == [
        f"error tokenizer.revision: revision 'v2' was asked for, but {str(padded)!r} is a local"
        " folder, which has none. Remove `revision`, or give the id of a hub repository."
    ]


def test_the_config_beside_a_tokenizer_is_held_to_the_same_rules_as_the_models(
    folder: Path, padded: Path, tmp_path: Path
) -> None:
    other = edit_config(copied(padded, tmp_path), _attn_implementation_internal="org/kernel")
    assert problems(folder, name_or_path=str(other)) == [
        f"error {other / 'config.json'}: _attn_implementation_internal: the config sets"
        " '_attn_implementation_internal' to 'org/kernel', by which a model folder can make code"
        " run that nobody here chose. Remove the key from the config, or set"
        " `trust_remote_code: true` if you trust whoever made the folder."
    ]


def test_a_local_tokenizer_opens_no_socket(
    folder: Path, padded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert tokenizer(folder).pad_token is None
    assert tokenizer(folder, name_or_path=str(padded)).pad_token == "<pad>"


def test_a_slow_tokenizer_that_is_not_to_be_had_is_said_to_be_missing(folder: Path) -> None:
    assert problems(folder, use_fast=False) == [
        "warning tokenizer.use_fast: `use_fast: false` was asked for, but TokenizersBackend is all"
        " that the installed transformers has, and it is a fast one. Remove `tokenizer.use_fast`."
        if IS_MODERN
        else f"error tokenizer.use_fast: the folder {str(folder)!r} holds no files of a slow"
        " tokenizer. Remove `tokenizer.use_fast`."
    ]


# --- the pad token ----------------------------------------------------------------------------

PAD_IS_EOS = (
    "warning tokenizer.pad_token: the pad token is the eos token '</s>': a loss that leaves out"
    " padding leaves out the end of each text, and the model may never learn to stop. Give padding"
    " a token of its own, or mask labels by attention mask and not by id."
)


def test_null_keeps_what_there_is(folder: Path, padded: Path) -> None:
    assert tokenizer(folder).pad_token is None
    assert tokenizer(padded).pad_token == "<pad>"


def test_eos_pads_where_nothing_did_as_in_eric_mitchells_dpo(folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    if theirs.pad_token_id is None:
        theirs.pad_token_id = theirs.eos_token_id
    ours = tokenizer(folder, pad_token="eos")
    assert ours.pad_token_id == theirs.pad_token_id == 2
    texts = ["the fox", "the quick brown fox"]
    assert ours(texts, padding=True).data == theirs(texts, padding=True).data


def test_a_pad_token_that_is_the_eos_token_is_a_warning(folder: Path, tmp_path: Path) -> None:
    assert problems(folder, pad_token="eos") == [PAD_IS_EOS]
    saved = copied(folder, tmp_path)
    tokenizer(folder, pad_token="eos").save_pretrained(saved)
    assert problems(saved) == [PAD_IS_EOS]


def test_unk_pads(folder: Path) -> None:
    assert tokenizer(folder, pad_token="unk").pad_token == "<unk>"
    assert problems(folder, pad_token="unk") == []


def test_an_existing_pad_token_is_not_overwritten_unasked(padded: Path) -> None:
    assert problems(padded, pad_token="eos") == [
        "error tokenizer.pad_token: the tokenizer already has the pad token '<pad>', and '</s>' was"
        " asked for. Set `tokenizer.keep_pad: true` to keep it, or `overwrite_pad: true`."
    ]
    assert problems(padded, pad_token="<pad>") == []


def test_a_pad_token_for_where_there_is_none_as_trl_has_it(folder: Path, padded: Path) -> None:
    section = {"pad_token": "eos", "keep_pad": True}
    assert tokenizer(folder, **section).pad_token == "</s>"
    assert tokenizer(padded, **section).pad_token == "<pad>"
    assert problems(padded, **section) == []
    with pytest.raises(llmload.SpecError) as caught:
        load(padded, overwrite_pad=True, **section)
    assert str(caught.value) == (
        "tokenizer: `keep_pad` and `overwrite_pad` contradict each other. Keep one of them."
    )


def test_an_existing_pad_token_is_overwritten_when_asked_as_colossalchat_always_does(
    padded: Path,
) -> None:
    theirs = AutoTokenizer.from_pretrained(padded)
    theirs.pad_token = theirs.eos_token
    ours = tokenizer(padded, pad_token="eos", overwrite_pad=True)
    assert ours.pad_token_id == theirs.pad_token_id == 2


def test_a_pad_token_that_the_vocabulary_lacks_is_an_error_with_the_nearest(folder: Path) -> None:
    assert problems(folder, pad_token="modle") == [
        "error tokenizer.pad_token: the pad token 'modle' is not among the 51 tokens of the"
        " vocabulary. Did you mean 'model' or 'more'? List it in `tokenizer.add_tokens` to add it."
    ]
    assert problems(folder, pad_token="[PAD]") == [
        "error tokenizer.pad_token: the pad token '[PAD]' is not among the 51 tokens of the"
        " vocabulary. List it in `tokenizer.add_tokens` to add it."
    ]


def test_a_pad_token_can_be_added(folder: Path, tmp_path: Path) -> None:
    ours = tokenizer(folder, pad_token="[PAD]", add_tokens=["[PAD]"])
    assert (ours.pad_token, ours.pad_token_id, len(ours)) == ("[PAD]", 51, 52)
    assert ours.decode([3, 51, 51], skip_special_tokens=True) == "the"
    ours.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.pad_token_id, len(again)) == (51, 52)


def test_a_word_of_the_vocabulary_that_pads_becomes_special(folder: Path) -> None:
    ours = tokenizer(folder, pad_token="fox")
    assert ours.decode(ours.encode("the fox"), skip_special_tokens=True) == "the"


def test_a_pad_token_by_the_name_of_a_token_that_is_missing_is_an_error(
    folder: Path, tmp_path: Path
) -> None:
    lacking = copied(folder, tmp_path)
    plain = AutoTokenizer.from_pretrained(folder)
    plain.eos_token = None
    plain.save_pretrained(lacking)
    assert problems(lacking, pad_token="eos") == [
        "error tokenizer.pad_token: the pad token is to be the eos token, but the tokenizer has"
        " none. Name a token of the vocabulary, or set `tokenizer.add_special_tokens:"
        " {eos_token: ...}`."
    ]


# --- added tokens, sides, frame, chat template --------------------------------------------------


def test_added_tokens_go_to_the_end_and_keep_their_flags(folder: Path) -> None:
    result = load(
        folder, add_tokens=["fox", "<a>", {"content": "<b>", "special": True, "lstrip": True}]
    )
    ours = result.tokenizer
    assert ours is not None
    assert ours.convert_tokens_to_ids(["<a>", "<b>"]) == [51, 52]
    assert not ours.added_tokens_decoder[51].special
    assert ours.added_tokens_decoder[52].special
    assert ours.added_tokens_decoder[52].lstrip
    assert result.report.facts["tokenizer"]["new_tokens"] == {"<a>": 51, "<b>": 52}
    assert notes(result.plan) == [
        f"{BACKEND} with 53 tokens, '<a>', '<b>' new; pad token None, padding on the right"
    ]


def test_special_tokens_are_set_by_name_and_those_that_are_there_stay(
    folder: Path, tmp_path: Path
) -> None:
    saved = copied(folder, tmp_path)
    tokenizer(folder, add_special_tokens={"additional_special_tokens": ["<a>"]}).save_pretrained(
        saved
    )
    ours = tokenizer(
        saved, add_special_tokens={"eos_token": "<end>", "additional_special_tokens": ["<b>"]}
    )
    assert (ours.eos_token, ours.bos_token) == ("<end>", "<s>")
    assert {"<a>", "<b>", "<end>"} <= set(ours.all_special_tokens)


def test_sides_and_length_are_set(folder: Path) -> None:
    ours = tokenizer(
        folder, padding_side="left", truncation_side="left", model_max_length=4, pad_token="unk"
    )
    long, short = ours(["the quick brown fox jumps over", "fox"], padding=True, truncation=True)[
        "input_ids"
    ]
    assert ours.convert_ids_to_tokens(long) == ["brown", "fox", "jumps", "over"]
    assert ours.convert_ids_to_tokens(short) == ["<unk>", "<unk>", "<unk>", "fox"]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("template", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
def test_texts_begin_with_bos_and_end_with_eos_as_asked_whatever_the_tokenizer_did(
    folder: Path, tmp_path: Path, bos: bool, eos: bool, template: str | None
) -> None:
    """Llama 3 adds bos by its post-processor, while its ``add_bos_token`` is false."""
    framing = copied(folder, tmp_path)
    plain = tiny_tokenizer()
    if template is not None:
        plain.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    plain.save_pretrained(framing)
    ours = tokenizer(framing, add_bos_token=bos, add_eos_token=eos)
    assert ours.encode("the") == [1] * bos + [3] + [2] * eos


def test_a_frame_that_is_half_asked_for_keeps_the_other_half(folder: Path, tmp_path: Path) -> None:
    framing = copied(folder, tmp_path)
    plain = tiny_tokenizer()
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    plain.save_pretrained(framing)
    assert tokenizer(framing, add_bos_token=False).encode("the") == [3, 2]
    assert tokenizer(framing, add_eos_token=False).encode("the") == [1, 3]


def test_a_bos_token_that_the_tokenizer_lacks_cannot_be_added(tmp_path: Path) -> None:
    encoder = tiny_checkpoint(tmp_path / "llama")
    plain = AutoTokenizer.from_pretrained(encoder)
    plain.bos_token = None
    plain.save_pretrained(encoder)
    assert problems(encoder, add_bos_token=True) == [
        f"error tokenizer.add_bos_token: the tokenizer ({BACKEND}) has no bos token to add."
        " Set it in `tokenizer.add_special_tokens: {bos_token: ...}`."
    ]


def test_a_tokenizer_that_cannot_leave_out_eos_is_an_error(tmp_path: Path) -> None:
    bytewise = tiny_checkpoint(tmp_path / "t5", "t5", auto_class="seq2seq_lm", vocab_size=400)
    without_tokenizer_in_place(bytewise)
    ByT5Tokenizer().save_pretrained(bytewise)
    spec = {"model": str(bytewise), "auto_class": "seq2seq_lm"}
    plan = llmload.plan(spec | {"tokenizer": {"add_eos_token": False}})
    assert [str(problem) for problem in plan.errors] == [
        "tokenizer.add_eos_token: ByT5Tokenizer adds the eos token, and cannot be told otherwise."
        " Remove `tokenizer.add_eos_token`."
    ]


TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
WAYS = (
    "Write the template itself, the path of a file that holds it, or a folder or hub id whose"
    " tokenizer has one."
)
CONVERSATION = [{"role": "user", "content": "the fox"}]


def test_a_chat_template_is_taken_as_text_or_from_a_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    for template in (TEMPLATE, str(file)):
        ours = tokenizer(folder, chat_template=template)
        assert ours.chat_template == TEMPLATE
        assert ours.apply_chat_template(CONVERSATION, tokenize=False) == "[user] the fox\n"


def test_null_keeps_the_chat_template(tmp_path: Path) -> None:
    chatty = tiny_checkpoint(tmp_path / "chatty", chat_template=TEMPLATE)
    assert tokenizer(chatty).chat_template == TEMPLATE


def test_a_chat_template_may_refuse_some_conversations(folder: Path) -> None:
    strict = "{{ raise_exception('begin with a system message') }}"
    assert tokenizer(folder, chat_template=strict).chat_template == strict


def test_a_chat_template_that_is_no_jinja_or_no_file_is_an_error(folder: Path) -> None:
    assert problems(folder, chat_template="{{ messages }}\n{% for %}") == [
        "error tokenizer.chat_template: the chat template has a Jinja error in line 2: Expected an"
        " expression, got 'end of statement block'. Mend the template."
    ]
    assert problems(folder, chat_template="{{ messages") == [
        "error tokenizer.chat_template: the chat template has a Jinja error in line 1: unexpected"
        " end of template, expected 'end of print statement'. Mend the template."
    ]
    assert problems(folder, chat_template="no/such.jinja") == [
        "error tokenizer.chat_template: the chat template file 'no/such.jinja' does not exist."
        f" {WAYS}"
    ]


def test_an_empty_chat_template_is_refused() -> None:
    with pytest.raises(llmload.SpecError) as caught:
        llmload.plan({"model": "anywhere", "tokenizer": {"chat_template": ""}})
    assert str(caught.value) == "tokenizer.chat_template: must have 1 or more characters, found ''"


@pytest.mark.parametrize("asked", ["chatml", "a sentence", "llama3", "some/deep/path", "[INST]"])
def test_what_would_render_every_conversation_as_itself_is_refused(
    asked: str, folder: Path
) -> None:
    assert problems(folder, chat_template=asked) == [
        f"error tokenizer.chat_template: {asked!r} is no chat template: it has no `{{{{` and no"
        f" `{{%`, and no file or folder is called so. {WAYS}"
    ]


def test_a_hub_id_that_cannot_be_fetched_is_refused_as_one(folder: Path) -> None:
    (text,) = problems(folder, chat_template="org/name")
    assert text.startswith("error tokenizer.chat_template: 'org/name' is not a folder, and the hub")


def test_a_file_without_a_template_is_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.txt"
    file.write_text("chatml")
    assert problems(folder, chat_template=str(file)) == [
        f"error tokenizer.chat_template: the file {str(file)!r} holds no chat template: it has no"
        f" `{{{{` and no `{{%`. {WAYS}"
    ]
    file.write_text(TEMPLATE)
    assert tokenizer(folder, chat_template=str(file)).chat_template == TEMPLATE


def test_another_models_tokenizer_gives_its_template(folder: Path, tmp_path: Path) -> None:
    chatty = tiny_checkpoint(tmp_path / "chatty", chat_template=TEMPLATE)
    assert tokenizer(folder, chat_template=str(chatty)).chat_template == TEMPLATE
    # Before 4.52 the template was saved in the tokenizer's config, alone or by name.
    (chatty / "chat_template.jinja").unlink(missing_ok=True)
    file = chatty / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "{{ x }}"}, {"name": "default", "template": TEMPLATE}]
    for stored in (TEMPLATE, named):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": stored}))
        assert tokenizer(folder, chat_template=str(chatty)).chat_template == TEMPLATE
    assert problems(folder, chat_template=str(folder)) == [
        f"error tokenizer.chat_template: the tokenizer in {str(folder)!r} has no chat template."
        f" {WAYS}"
    ]


# --- rows for tokens, without the section `embeddings` ------------------------------------------


def test_new_tokens_beyond_the_embedding_are_an_error(folder: Path) -> None:
    added = [f"<{number}>" for number in range(80)]
    assert problems(folder, embeddings=False, add_tokens=added) == [
        "error tokenizer: the tokenizer has ids up to 130, the model's embedding has 128 rows. Add"
        " the section `embeddings: {}`."
    ]
    assert problems(folder, add_tokens=added) == []


def test_a_models_own_tokenizer_beyond_its_embedding_is_a_warning(tmp_path: Path) -> None:
    small = tiny_checkpoint(tmp_path / "small", vocab_size=48)
    assert problems(small, embeddings=False) == [
        "warning tokenizer: the tokenizer has ids up to 50, the model's embedding has 48 rows. Add"
        " the section `embeddings: {}`."
    ]


def test_new_tokens_on_untrained_rows_are_a_warning(folder: Path) -> None:
    assert problems(folder, embeddings=False, add_tokens=["<a>", "<b>", "<c>", "<d>"]) == [
        "warning tokenizer: the new tokens '<a>', '<b>', '<c>' and 1 more have rows in the"
        " checkpoint that no training has touched. Add the section `embeddings: {}` to initialise"
        " them."
    ]


# --- the model's ids ----------------------------------------------------------------------------


def test_the_models_ids_follow_the_tokenizer(folder: Path) -> None:
    result = load(folder, pad_token="unk", add_special_tokens={"eos_token": "<end>"})
    config, generation = result.model.config, result.model.generation_config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 51)
    assert (generation.pad_token_id, generation.eos_token_id) == (0, [51, 2])
    assert result.report.facts["tokenizer"]["aligned"] == {
        "config.pad_token_id": [None, 0],
        "config.eos_token_id": [2, 51],
        "generation_config.pad_token_id": [None, 0],
        "generation_config.eos_token_id": [2, [51, 2]],
    }


def test_further_fields_of_the_config_hold_the_eos_id(folder: Path, tmp_path: Path) -> None:
    result = load(folder, eos_config_fields=["end_token_id"])
    assert result.model.config.end_token_id == 2
    assert not hasattr(result.model.generation_config, "end_token_id")
    assert result.report.facts["tokenizer"]["aligned"] == {"config.end_token_id": [None, 2]}

    bare = copied(folder, tmp_path)
    own = tiny_tokenizer()
    own.eos_token = None
    own.save_pretrained(bare)
    assert problems(bare, eos_config_fields=["end_token_id"]) == [
        "error tokenizer.eos_config_fields: the tokenizer has no eos token whose id they could"
        " hold. Set it in `tokenizer.add_special_tokens: {eos_token: ...}`."
    ]


def test_a_list_of_eos_ids_is_kept(folder: Path, tmp_path: Path) -> None:
    several = edit_config(copied(folder, tmp_path), eos_token_id=[2, 9])
    GenerationConfig(bos_token_id=1, eos_token_id=[7, 2]).save_pretrained(several)
    result = load(several)
    assert result.model.config.eos_token_id == [2, 9]
    assert result.model.generation_config.eos_token_id == [7, 2]
    changed = load(several, add_special_tokens={"eos_token": "<end>"}).model
    assert changed.config.eos_token_id == [51, 2, 9]
    assert changed.generation_config.eos_token_id == [51, 7, 2]


def test_ids_of_tokens_that_the_tokenizer_lacks_are_left_alone(
    folder: Path, tmp_path: Path
) -> None:
    own = edit_config(copied(folder, tmp_path), pad_token_id=9)
    assert load(own).model.config.pad_token_id == 9


def test_the_adapter_wrapped_model_has_the_ids_too(folder: Path) -> None:
    lora = {"r": 2, "target_modules": ["q_proj"]}
    spec = {"model": str(folder), "tokenizer": {"pad_token": "unk"}, "lora": lora}
    result = llmload.load(spec)
    assert result.model.get_base_model().config.pad_token_id == 0


def test_a_sequence_classifier_learns_which_token_pads(folder: Path) -> None:
    """Without the id it refuses batches of more than one text."""
    result = llmload.load(
        {
            "model": str(folder),
            "auto_class": "sequence_classification",
            "tokenizer": {"pad_token": "unk"},
            "strict": False,
        }
    )
    assert result.tokenizer is not None
    batch = result.tokenizer(["the fox", "fox"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert result.model(**batch).logits.shape == (2, 2)


@pytest.mark.refused_late  # a plugin against another
def test_ids_that_a_later_plugin_changes_fail_the_audit(folder: Path) -> None:
    class Meddler:
        name = "meddler"
        after = ("tokenizer",)

        @llmload.hookimpl
        def post_load(self, ctx: llmload.LoadContext, model: Any) -> Any:
            model.config.pad_token_id = 5
            return model

    registry = llmload.create_registry([Meddler()])
    with pytest.raises(llmload.AuditError) as refused:
        llmload.load({"model": str(folder), "tokenizer": {"pad_token": "unk"}}, registry=registry)
    assert str(refused.value) == (
        "plugin 'tokenizer': config.pad_token_id is 5, the tokenizer asks for 0. A plugin after"
        " `tokenizer` changed it; report this to its makers."
    )


# --- the section --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"padding_side": "both"},
            "tokenizer.padding_side: expected 'left' or 'right', found 'both'",
        ),
        ({"model_max_length": 0}, "tokenizer.model_max_length: must be greater than 0, found 0"),
        (
            {"pad_tokn": "eos"},
            "tokenizer.pad_tokn: unknown key. Did you mean 'pad_token'?",
        ),
        (
            {"add_special_tokens": {"pad_token": "<pad>"}},
            "tokenizer.add_special_tokens.pad_token: unknown key, known from TRL. Write"
            " `tokenizer: {pad_token: <pad>}`.",
        ),
    ],
)
def test_a_wrong_section_is_refused(folder: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(llmload.SpecError) as refused:
        llmload.plan({"model": str(folder), "tokenizer": section})
    assert str(refused.value) == message


# --- folders ------------------------------------------------------------------------------------


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def without_tokenizer_in_place(folder: Path) -> Path:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return folder


def without_tokenizer(folder: Path, tmp_path: Path) -> Path:
    return without_tokenizer_in_place(copied(folder, tmp_path))


@pytest.mark.skipif(
    importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed"
)
@pytest.mark.skipif(not IS_MODERN, reason="4.51.3 says so itself")
def test_a_missing_sentencepiece_is_not_called_a_missing_tiktoken(tmp_path: Path) -> None:
    llama = tiny_llama(tmp_path)
    (llama / "tokenizer.json").unlink()
    (llama / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    file = llama / "tokenizer_config.json"
    content = json.loads(file.read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    file.write_text(json.dumps(content))
    assert problems(llama) == [
        "error tokenizer.name_or_path: the vocabulary in"
        f" {str(llama / 'tokenizer.model')!r} is read by sentencepiece, which is not"
        " installed. Install it with `pip install sentencepiece protobuf`."
    ]


@pytest.mark.parametrize("name", ["pad", "eos", "bos"])
def test_a_special_token_of_the_folder_that_has_no_row_is_refused(
    tmp_path: Path, name: str
) -> None:
    folder = tiny_llama(tmp_path, vocab_size=51)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({f"{name}_token": "<beyond>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(llmload.RequestError) as caught:
        llmload.load({"model": str(folder)})
    assert str(caught.value) == (
        "tokenizer: the tokenizer has ids up to 51, the model's embedding has 51 rows: the"
        f" {name} token '<beyond>' has id 51. Add the section `embeddings: {{}}`, or name other"
        " tokens in `tokenizer.add_special_tokens`."
    )
    model = llmload.load({"model": str(folder), "embeddings": {}}).model
    model.save_pretrained(tmp_path / "saved")
    llmload.load({"model": str(tmp_path / "saved")})


def test_an_ordinary_word_as_pad_token_is_a_warning(folder: Path) -> None:
    assert problems(folder, pad_token="fox") == [
        "warning tokenizer.pad_token: the pad token 'fox' is an ordinary token of the vocabulary:"
        " where a text has it, a loss that leaves out padding leaves it out. Give padding a token"
        " of its own: list it in `tokenizer.add_tokens`."
    ]
    assert problems(folder, pad_token="unk") == []
    assert problems(folder, pad_token="<own>", add_tokens=["<own>"]) == []
