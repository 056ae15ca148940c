"""The key ``config``: values in place of the model's own, as if its file had them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import IS_MODERN

import llmload
from llmload.hf import installed_transformers
from llmload.testing import tiny_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("overridden") / "llama", "llama")


def edited(folder: Path, to: Path, values: dict[str, Any]) -> Path:
    """A copy of a model folder whose config.json has the values."""
    shutil.copytree(folder, to)
    file = to / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return to


def comparable(model: Any) -> dict[str, Any]:
    return {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}


LINEAR = {"rope_type": "linear", "factor": 2.0}
OF_ROPE: list[dict[str, Any]] = (
    [{"rope_parameters": LINEAR | {"rope_theta": 500.0}}]
    if IS_MODERN
    else [{"rope_theta": 500.0}, {"rope_scaling": LINEAR}]
)


@pytest.mark.parametrize(
    "values",
    [
        {"rms_norm_eps": 0.01},
        *OF_ROPE,
        {"max_position_embeddings": 512, **OF_ROPE[0]},
        {"attention_dropout": 0.25},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("loader", ["streaming", "transformers"])
def test_what_is_loaded_is_what_a_folder_with_these_values_gives(
    llama: Path, tmp_path: Path, values: dict[str, Any], loader: str
) -> None:
    other = edited(llama, tmp_path / "edited", values)
    block = {"streaming"} if loader == "transformers" else set()
    registry = llmload.create_registry(block=block)
    strict = {"strict": {"allow_unexpected": ["lm_head"]}} if len(values) == 1 else {}
    spec = {"model": str(llama), "config": values, **strict}
    ours = llmload.load(spec, registry=registry)
    theirs = llmload.load({"model": str(other), **strict}, registry=registry)
    assert ours.report.loader == loader
    assert comparable(ours.model) == comparable(theirs.model)
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert torch.equal(ours.model.eval()(ids).logits, theirs.model.eval()(ids).logits)
    assert ours.model.config.name_or_path == str(llama)


@pytest.mark.skipif(not IS_MODERN, reason="transformers 4.51 has no rope_parameters")
def test_what_older_files_call_rope_is_taken_where_the_file_calls_it_so(
    llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(llama, tmp_path / "old")
    file = folder / "config.json"
    content = json.loads(file.read_text())
    del content["rope_parameters"]
    file.write_text(json.dumps(content | {"rope_theta": 10000.0}))
    spec = {"model": str(folder), "config": {"rope_theta": 500.0, "rope_scaling": LINEAR}}
    assert llmload.load(spec).model.config.rope_parameters == LINEAR | {"rope_theta": 500.0}
    with pytest.raises(llmload.SpecError) as refused:
        llmload.plan({"model": str(llama), "config": {"rope_theta": 500.0}})
    assert str(refused.value) == (
        "config.rope_theta: the config has 'rope_theta' in its `rope_parameters`. Set"
        " `rope_parameters`, whole: `{rope_type: linear, factor: 2.0, rope_theta: 1e4}`."
    )


def test_a_part_of_a_composite_config_is_changed_key_by_key(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "llava", "llava", auto_class="image_text_to_text")
    before = llmload.plan({"model": str(folder), "auto_class": "image_text_to_text"})
    assert not before.errors
    spec = {
        "model": str(folder),
        "auto_class": "image_text_to_text",
        "config": {"text_config": {"attention_dropout": 0.5}},
    }
    config = llmload.load(spec).model.config
    stored = json.loads((folder / "config.json").read_text())["text_config"]
    assert config.text_config.attention_dropout == 0.5
    assert config.text_config.hidden_size == stored["hidden_size"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rms_norm_epss": 1e-5},
            "config.rms_norm_epss: a config of model type 'llama' has no key 'rms_norm_epss'. Did"
            " you mean 'rms_norm_eps'?",
        ),
        ({"to_dict": 1}, "config.to_dict: a config of model type 'llama' has no key 'to_dict'."),
        (
            {"dtype": "float16"},
            "config.dtype: 'dtype' has a key of its own. Set `dtype`, beside `config`.",
        ),
        (
            {"num_labels": 3},
            "config.num_labels: 'num_labels' has a key of its own. Set `labels`, beside `config`.",
        ),
        (
            {"attn_implementation": "someone/kernel"},
            "config.attn_implementation: 'attn_implementation' has a key of its own.",
        ),
        (
            {"auto_map": {"AutoConfig": "a--b.C"}},
            "config.auto_map: 'auto_map' says what the checkpoint is, and is not to be set.",
        ),
        ({"_name_or_path": "x"}, "config._name_or_path: '_name_or_path' says what the checkpoint"),
        ({"model_type": "gpt2"}, "config.model_type: 'model_type' says what the checkpoint is"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_key_that_cannot_be_set_is_refused_before_anything_is_read(
    llama: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(llmload.SpecError) as refused:
        llmload.plan({"model": str(llama), "config": values})
    assert str(refused.value).startswith(message)


def test_a_model_that_the_checkpoint_cannot_hold_is_not_built(llama: Path) -> None:
    with pytest.raises(llmload.SpecError) as refused:
        llmload.plan({"model": str(llama), "config": {"num_hidden_layers": 10**6}})
    assert str(refused.value).startswith("config: ")
    assert str(refused.value).endswith("Set a smaller number.")


@pytest.mark.skipif(
    installed_transformers().quantises_weight_by_weight() is False,
    reason="transformers 4.51 looks at no types of a config",
)
def test_a_value_of_another_kind_is_refused_with_the_librarys_reason(llama: Path) -> None:
    with pytest.raises(llmload.SpecError) as refused:
        llmload.plan({"model": str(llama), "config": {"hidden_act": 3}})
    message = str(refused.value)
    assert message.startswith("config: transformers refuses the config with these values: ")
    assert "hidden_act" in message
