"""Each head comes from its system's own files and goes back to them, bit by bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from making import CASES, load, needs_safe_pickles, read, refusal, saved, write
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from llmload.testing import tiny_checkpoint

MODEL_TYPES = ["llama", "gpt2", "opt"]


def rewrite(folder: Path, change: Any) -> Path:
    """Rewrite the file of weights, whichever it is."""
    tensors = {name: value.clone() for name, value in read(folder).items()}
    change(tensors)
    if (folder / "model.safetensors").exists():
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    return write(folder, tensors)


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value.view(torch.uint8), expected[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_round_trip_through_the_systems_files_changes_no_bit(
    case: tuple[str, str], model_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder, theirs = saved(tmp_path / "in", case[1], model_type, dtype)
    result = load(folder, case)
    assert_same(result.model.state_dict(), theirs.state_dict())
    assert result.report.newly_initialised == {}
    assert result.report.left_out == {}
    result.model.save_pretrained(tmp_path / "out")
    assert_same(read(tmp_path / "out"), read(folder))
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "out")
    if case[1] != "trl":
        write(tmp_path / "out", read(tmp_path / "out"))
    assert_same(load(tmp_path / "out", case).model.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_classifier_with_one_label_is_transformers_own(model_type: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(
        tmp_path, model_type, auto_class="sequence_classification", num_labels=1, pad=True
    )
    result = load(folder, ("reward_head", "sequence_classification"))
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(result.model) is type(theirs)
    assert_same(result.model.state_dict(), theirs.state_dict())
    result.model.save_pretrained(tmp_path / "out")
    assert_same(read(tmp_path / "out"), read(folder))


def test_deepspeed_chats_misspelt_files_load_with_the_rule_for_them(tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path, "deepspeed_chat")
    old = {k.replace("rwtransformer", "rwtranrsformer"): v for k, v in read(folder).items()}
    write(folder, old)
    case = ("critic_head", "deepspeed_chat")
    assert "strict: the model has no place for 'rwtranrsformer." in refusal(folder, case)
    result = load(folder, case, key_rules=["deepspeed_chat"])
    assert_same(result.model.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("section", ["reward_head", "critic_head"])
def test_the_files_with_which_old_coati_lost_its_weights_load_whole(
    section: str, model_type: str, tmp_path: Path
) -> None:
    """Saved without the first ``model.``, loaded back with ``strict=False``: only the head was."""
    folder, theirs = saved(tmp_path, "coati", model_type)
    short = {k.replace("model.", "", 1): v for k, v in read(folder).items()}
    write(folder, short)
    for rules in ([], ["coati"]):
        result = load(folder, (section, "coati"), key_rules=rules)
        assert_same(result.model.state_dict(), theirs.state_dict())


def test_trls_model_loads_from_a_state_dict_of_the_whole_wrapper(tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path, "trl")
    whole = {name: value.clone() for name, value in theirs.state_dict().items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    result = load(folder, ("value_head", "trl"))
    assert_same(result.model.state_dict(), theirs.state_dict())


def test_a_head_may_come_from_a_file_beside_its_folder(tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path / "saved", "coati")
    base = tiny_checkpoint(tmp_path / "base", "llama", pad=True)
    (file,) = [*folder.glob("*.bin"), *folder.glob("*.safetensors")]
    file = file.rename(tmp_path / {".bin": "rm.pt"}.get(file.suffix, "rm.safetensors"))
    result = load(base, ("reward_head", "coati"), weights_from=file)
    assert_same(result.model.state_dict(), theirs.state_dict())


# --- damage -----------------------------------------------------------------------------------

HEADS = {"deepspeed_chat": "v_head.weight", "coati": "value_head.weight"}
HEADS["trl"] = "v_head.summary.weight"
PREFIXES = {"deepspeed_chat": "rwtransformer.", "coati": "model.", "trl": "model."}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_file_without_its_head_is_refused_by_name(case: tuple[str, str], tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, case[1])
    key = HEADS[case[1]]
    rewrite(folder, lambda tensors: tensors.pop(key))
    assert refusal(folder, case) == (
        f"{case[0]}: the checkpoint has no {key!r}. Write `{case[0]}: {{new: true}}` to start with"
        " a new head, or map the keys."
    )


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_head_of_another_shape_is_refused_by_name(case: tuple[str, str], tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, case[1])
    key = HEADS[case[1]]
    rewrite(folder, lambda tensors: tensors.update({key: torch.ones(2, 16)}))
    (file,) = [*folder.glob("*.bin"), *folder.glob("*.safetensors")]
    assert refusal(folder, case) == (
        f"{file}: {key}: the head has shape (2, 16), the model takes (1, 16). Check that"
        " config.json and weights belong together."
    )


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_file_without_one_of_the_transformers_weights_is_refused(
    case: tuple[str, str], tmp_path: Path
) -> None:
    folder, _ = saved(tmp_path, case[1])
    key = PREFIXES[case[1]] + "norm.weight"
    rewrite(folder, lambda tensors: tensors.pop(key))
    name = key if case[1] == "trl" else "norm.weight"
    assert f"strict: the checkpoint has no values for {name!r}." in refusal(folder, case)


def test_a_head_with_a_bias_too_many_is_refused_by_name(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "deepspeed_chat")
    rewrite(folder, lambda tensors: tensors.update({"v_head.bias": torch.ones(1)}))
    (file,) = [*folder.glob("*.bin"), *folder.glob("*.safetensors")]
    assert refusal(folder, ("reward_head", "deepspeed_chat")) == (
        f"{file}: v_head.bias: a deepspeed_chat head has no 'v_head.bias',"
        " only 'v_head.weight'. Choose another `layout` in `reward_head`, or map the key."
    )


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_file_that_is_cut_off_is_refused_by_name(case: tuple[str, str], tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, case[1])
    (file,) = [*folder.glob("*.bin"), *folder.glob("*.safetensors")]
    file.write_bytes(file.read_bytes()[:-64])
    assert refusal(folder, case).startswith(f"{file}: the file is cut off")


@needs_safe_pickles
@pytest.mark.parametrize("layout", ["deepspeed_chat", "coati"])
def test_a_pickle_wants_leave(layout: str, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, layout)
    assert refusal(folder, ("reward_head", layout), allow_pickle=False) == (
        f"{folder / 'pytorch_model.bin'}: the only weights here are a pickle, and opening a pickle"
        " can run code. Convert it to safetensors elsewhere, or set allow_pickle: true with torch"
        " >= 2.10."
    )


def test_a_classifier_without_its_head_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_checkpoint(
        tmp_path, "llama", auto_class="sequence_classification", num_labels=1, pad=True
    )
    rewrite(folder, lambda tensors: tensors.pop("score.weight"))
    told = refusal(folder, ("reward_head", "sequence_classification"))
    assert told.splitlines()[0] == (
        "reward_head: the checkpoint has no 'score.weight'. Write `reward_head: {new: true}` to"
        " start with a new head, or map the keys."
    )


@needs_safe_pickles
def test_a_pickle_beside_safetensors_is_read_only_where_it_is_named(tmp_path: Path) -> None:
    """DeepSpeed-Chat reads the pickle of such a folder, whatever lies beside it."""
    folder, theirs = saved(tmp_path, "deepspeed_chat")
    pickled = theirs.state_dict()
    newer = {name: value + 1 for name, value in pickled.items()}
    save_file(newer, folder / "model.safetensors", metadata={"format": "pt"})
    case = ("critic_head", "deepspeed_chat")
    assert_same(load(folder, case).model.state_dict(), newer)
    named = load(folder, case, weights_from=str(folder / "pytorch_model.bin"))
    assert_same(named.model.state_dict(), pickled)
