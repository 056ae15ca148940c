"""Every plugin of this distribution keeps llmload's contract."""

from __future__ import annotations

from typing import Any

import pytest

from llmload.testing import assert_plugin
from llmload_rlhf.plugins import CriticHeadPlugin, RewardHeadPlugin, ValueHeadPlugin


@pytest.mark.parametrize("layout", ["deepspeed_chat", "coati"])
@pytest.mark.parametrize("plugin", [RewardHeadPlugin, CriticHeadPlugin])
def test_a_head_on_a_transformer_keeps_the_contract(plugin: Any, layout: str) -> None:
    spec = {"auto_class": "base", plugin.name: {"layout": layout, "new": True}}
    assert_plugin(plugin, spec=spec, bad=[{"layout": "trl", "new": True}, {"layout": layout}])


def test_a_head_beside_a_language_models_keeps_the_contract() -> None:
    spec = {"value_head": {"new": True}}
    assert_plugin(ValueHeadPlugin, spec=spec, bad=[{}, {"layout": "coati"}])


def test_transformers_own_head_keeps_the_contract() -> None:
    section = {"layout": "sequence_classification", "new": True}
    spec = {"auto_class": "sequence_classification", "reward_head": section}
    assert_plugin(RewardHeadPlugin, spec=spec)
