"""docs/parity.md: its recipes are there, and what it says to write is a spec."""

from __future__ import annotations

import importlib
import re

import pytest
import yaml
from recipes import EXAMPLES, ROOT

from llmload import create_registry
from llmload.spec.loadspec import LoadSpec

PAGE = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
FRAGMENTS = [
    code
    for line in PAGE.splitlines()
    if line.startswith("| ")
    for code in re.findall(r"`(\w+: [^`]+)`", line.split(" | ")[-1])
    if not code.startswith("frozen_copy")  # of a group
]


def test_every_recipe_is_on_the_page() -> None:
    linked = re.findall(r"\(\.\./(?:plugins/llmload-rlhf/)?examples/([\w.]+)\)", PAGE)
    folders = (EXAMPLES, ROOT / "plugins" / "llmload-rlhf" / "examples")
    recipes = [
        file.name
        for folder in folders
        for file in folder.glob("*.yaml")
        if "parity.md" in file.read_text()
    ]
    assert sorted(linked) == sorted(recipes)
    assert len(recipes) == 12


def test_there_are_fragments() -> None:
    assert len(FRAGMENTS) > 12


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_what_the_page_says_to_write_is_valid(
    fragment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = yaml.safe_load(fragment)
    plugins: list[object] = []
    if keys.keys() & {"coati_policy", "critic_head", "reward_head"}:
        # Of llmload-rlhf, which not every stack has installed.
        monkeypatch.syspath_prepend(ROOT / "plugins" / "llmload-rlhf")
        module = importlib.import_module("llmload_rlhf.plugins")
        policies = importlib.import_module("llmload_rlhf.policies")
        plugins = [module.CriticHeadPlugin, module.RewardHeadPlugin, module.ValueHeadPlugin]
        plugins.append(policies.CoatiPolicyPlugin)
    registry = create_registry(plugins, environ={})
    spec = registry.validate({"model": "org/name", **keys})
    assert keys.keys() <= LoadSpec.model_fields.keys() | spec.sections.keys()
