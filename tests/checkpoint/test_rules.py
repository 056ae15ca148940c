"""Rules that are made for one model are those that transformers makes for it among all others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stacks import IS_MODERN
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from llmload.testing import tiny_model

if not IS_MODERN:
    pytest.skip("this transformers only renames keys", allow_module_level=True)

from transformers import conversion_mapping
from transformers.core_model_loading import WeightRenaming

from llmload.hf.v5 import conversion_rules as rules


def described(found: list[Any] | None) -> Any:
    return found and [
        (
            type(rule),
            rule.source_patterns,
            rule.target_patterns,
            rule.compiled_sources.pattern,
            rule.scope_prefix,
            rule.base_model_prefix,
            [(type(one), vars(one)) for one in getattr(rule, "operations", ())],
        )
        for rule in found
    ]


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers has not made its rules yet."""
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", None)


def test_every_name_has_the_rules_that_transformers_gives_it() -> None:
    whole = conversion_mapping._build_checkpoint_conversion_mapping()
    find = rules.noted_rules()
    assert len(whole) > 100
    for name, expected in whole.items():
        assert described(find(name)) == described(expected), name
    assert find("no such model") is None


def test_each_name_gets_rules_of_its_own() -> None:
    find = rules.noted_rules()
    name = next(iter(conversion_mapping._build_checkpoint_conversion_mapping()))
    first, second = find(name), find(name)
    assert first
    assert second
    assert not {id(rule) for rule in first} & {id(rule) for rule in second}


def llava() -> PreTrainedModel:
    """A model of models, the inner ones with rules of their own."""
    config = AutoConfig.for_model("llava")
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize("make", [tiny_model, llava])
def test_a_model_gets_its_rules_and_transformers_makes_none(unbuilt: None, make: Any) -> None:
    model = make()
    found = rules.rules_of(model)
    assert conversion_mapping._checkpoint_conversion_mapping_cache is None
    expected = conversion_mapping.get_model_conversion_mapping(model, None, None)
    assert described(found) == described(expected)


def test_rules_that_a_user_registered_are_found(unbuilt: None) -> None:
    conversion_mapping.register_checkpoint_conversion_mapping(
        "llama", [WeightRenaming("old", "new")], overwrite=True
    )
    try:
        assert rules.rules_of(tiny_model())[0].source_patterns == ["old"]
    finally:
        conversion_mapping.USER_REGISTERED_MAPPINGS.discard("llama")
