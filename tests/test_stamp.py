"""A saved adapter says what made it, in a file beside it, and plain PEFT reads it as ever."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapters import plain, save, three_losses

import llmload
from llmload.testing import IDS, tiny_llama

LORA = {"r": 2, "target_modules": ["q_proj"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path)


def load(folder: Path, **keys: Any) -> llmload.LoadResult:
    return llmload.load({"model": str(folder), "dtype": "float32", "lora": LORA, **keys})


def made(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "llmload.json").read_text(encoding="utf-8"))
    return found


def test_it_says_which_plugin_of_which_distribution_did_what(folder: Path, tmp_path: Path) -> None:
    result = load(folder, dropout={"p": 0.0})
    three_losses(result.model)
    written = made(save(result.model, tmp_path / "adapter"))
    assert written["plugins"] == result.report.plugins == result.plan.plugins
    assert written["plugins"]["lora"] == f"llmload {llmload.__version__}"
    assert written["versions"] == result.report.versions
    assert [(step["hook"], step["plugin"]) for step in written["steps"]] == [
        (step.hook, step.plugin) for step in result.plan.steps
    ]
    notes = {step["plugin"]: step.get("notes") for step in written["steps"]}
    assert notes["lora"] == ["LoRA of rank 2, alpha 8 / r, on q_proj"]


def test_plain_peft_reads_the_adapter_without_a_word(folder: Path, tmp_path: Path) -> None:
    model = load(folder).model
    three_losses(model)
    adapter = save(model, tmp_path / "adapter")
    theirs = save(plain(folder, **LORA), tmp_path / "theirs")
    keys = [json.loads((f / "adapter_config.json").read_text()).keys() for f in (adapter, theirs)]
    assert keys[0] == keys[1]
    assert {f.name for f in adapter.iterdir()} - {f.name for f in theirs.iterdir()} == {
        "llmload.json"
    }
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = peft.PeftModel.from_pretrained(base, adapter)
    model.eval()
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_an_adapter_that_is_resumed_and_saved_again_says_what_made_it_now(
    folder: Path, tmp_path: Path
) -> None:
    first = save(load(folder, dropout={"p": 0.0}).model, tmp_path / "first")
    resumed = load(folder, lora={"adapter": str(first)})
    written = made(save(resumed.model, tmp_path / "second"))
    assert written["plugins"] == resumed.report.plugins
    assert "dropout" not in written["plugins"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_it_is_written_wherever_a_trainer_saves(folder: Path, tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=1, save_steps=1, report_to="none", use_cpu=True
    )
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    transformers.Trainer(load(folder).model, arguments, train_dataset=rows).train()
    assert "lora" in made(tmp_path / "run" / "checkpoint-1")["plugins"]


def test_an_adapter_of_another_name_has_its_own(folder: Path, tmp_path: Path) -> None:
    save(load(folder, lora=LORA | {"adapter_name": "mine"}).model, tmp_path / "adapter")
    assert "lora" in made(tmp_path / "adapter" / "mine")["plugins"]


class Ia3:
    """An adapter system of somebody else's."""

    name = "ia3"

    @llmload.hookimpl
    def wrap_adapter(self, ctx: llmload.LoadContext, model: Any) -> Any:
        config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
        return peft.get_peft_model(model, config).eval()


def test_adapters_of_any_plugin_are_stamped(folder: Path, tmp_path: Path) -> None:
    registry = llmload.create_registry([Ia3], environ={})
    model = llmload.load({"model": str(folder)}, registry=registry).model
    written = made(save(model, tmp_path / "adapter"))
    assert written["plugins"]["ia3"] == "given as an object"
    assert {"hook": "wrap_adapter", "plugin": "ia3"} in written["steps"]


def test_the_configuration_is_pefts_own_to_whoever_looks(folder: Path, tmp_path: Path) -> None:
    config = load(folder).model.peft_config["default"]
    assert isinstance(config, peft.LoraConfig)
    assert repr(config).startswith("LoraConfig(")
    assert "llmload" not in json.dumps(config.to_dict(), default=str)
    for other in (copy.deepcopy(config), copy.copy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        other.save_pretrained(tmp_path / "again")
        assert "lora" in made(tmp_path / "again")["plugins"]
        (tmp_path / "again" / "llmload.json").unlink()


def test_a_model_without_an_adapter_has_none(folder: Path, tmp_path: Path) -> None:
    adapter = save(load(folder).model, tmp_path / "adapter")
    merged = load(folder, lora={"adapter": str(adapter), "merge": True}).model
    merged.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "llmload.json").exists()
