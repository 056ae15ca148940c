"""The conformance suite finds each planted fault by its rule, and none in sound plugins."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
from faulty_plugins import FAULTS, SOUND, Chatty, FreezeLayers, Misspelt
from heavy_plugin import Heavy
from stacks import NO_BITSANDBYTES

import llmload
from llmload import testing
from llmload.testing import RULES, assert_plugin, findings

BUILT_IN = [info.name for info in llmload.create_registry(environ={}).plugins if info.builtin]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "coati": {"spec": {"coati": {}, "lora": {"r": 4}}},
    # DeepSpeed replaces the function for good, torch.distributed the hook; the group stays for the
    # training, with its sockets.
    "zero3": {"leaves": ("torch.nn.functional", "excepthook", "files", "process group")},
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_plugin_keeps_the_contract(name: str) -> None:
    if name == "kbit" and NO_BITSANDBYTES:
        pytest.skip(NO_BITSANDBYTES)
    (info,) = (i for i in llmload.create_registry(environ={}).plugins if i.name == name)
    assert_plugin(type(info.plugin), **ARGUMENTS.get(name, {}))


@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_found_in_a_sound_plugin(name: str) -> None:
    plugin, arguments = SOUND[name]
    assert findings(plugin, **arguments) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_by_its_rule_and_nothing_else(name: str) -> None:
    plugin, rule, words, arguments = FAULTS[name]
    found = findings(plugin, **{"timeout": 60.0, **arguments})
    assert {finding.rule for finding in found} == {rule}, [*map(str, found)]
    assert any(words in finding.message for finding in found), [*map(str, found)]
    assert all(re.search(r"[^.?!][.?]$", str(finding)) for finding in found), [*map(str, found)]


def test_a_module_that_imports_torch_is_found() -> None:
    (found,) = findings(Heavy)
    assert (found.rule, found.message) == (
        "light-import",
        "importing 'heavy_plugin' imports numpy, torch",
    )


def test_every_rule_is_broken_by_some_planted_fault() -> None:
    assert {rule for _, rule, _, _ in FAULTS.values()} | {"light-import"} == set(RULES)
    assert len(FAULTS) >= 30


def test_an_assertion_names_every_rule_and_what_to_do() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_plugin(Misspelt)
    assert str(caught.value) == (
        "plugin 'faulty' breaks the contract in 1 ways:\n"
        "- [hooks] `post_laod` is not a hook. Did you mean 'post_load'? See llmload.hookspecs for"
        " every hook and its arguments."
    )


def test_a_rule_can_be_skipped_and_must_exist() -> None:
    assert findings(Chatty, skip={"silence"}) == []
    with pytest.raises(ValueError, match=r"'silense' is not a rule\. Did you mean 'silence'\?"):
        findings(Chatty, skip={"silense"})


def test_a_class_made_inside_a_test_and_an_object_are_tried_too() -> None:
    class Local:
        name = "local"

        @llmload.hookimpl
        def check(self, ctx: Any) -> Any:
            yield llmload.Note(text="here")

    assert findings(Local) == []
    assert findings(FreezeLayers()) == []


def test_the_process_that_asks_is_not_touched() -> None:
    # What stays by design: the server that ranks are forked from, and a variable of torch._dynamo.
    findings(FreezeLayers)
    testing.snapshot()
    before = dict(os.environ)
    with testing.nothing_left_behind():
        findings(FAULTS["an environment variable left"][0])
    assert dict(os.environ) == before
