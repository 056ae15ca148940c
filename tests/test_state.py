"""Whatever fails, in whichever hook of whichever plugin: the process is as it was before."""

from __future__ import annotations

import inspect
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import NO_BITSANDBYTES

import llmload
from llmload.builtin.colossalai import booster
from llmload.errors import LoadFailedError, RequestError
from llmload.host.registry import create_registry
from llmload.testing import run_on_ranks, tiny_checkpoint
from llmload.testing.leftovers import changes, snapshot

SPECS: dict[str, dict[str, Any]] = {
    "cast": {"cast": {"modules": {"norm": "float32"}}},
    "coati": {"coati": {}, "lora": {"r": 2}},
    "colossalai": {"colossalai": {}, "lora": {"r": 2}},
    "dropout": {"dropout": {"p": 0.0}},
    "embeddings": {"embeddings": {"pad_to_multiple_of": 64}},
    "gradient_checkpointing": {"gradient_checkpointing": {}},
    "kbit": {"kbit": {"bits": 4}, "lora": {"r": 2}},
    "lora": {"lora": {"r": 2}},
    "streaming": {"streaming": {"mapped": False}},
    "tokenizer": {"tokenizer": {"add_tokens": ["<new>"]}, "embeddings": {}},
    "transformers": {},
    "verify": {"verify": {"finite": True}},
    "zero3": {"zero3": {}, "lora": {"r": 2}, "dtype": "float32"},
}
"""Plugin -> what makes it take part. The folder is added."""
BUILT_IN = [info for info in create_registry(environ={}).plugins if info.builtin]
NO_BOOSTER = booster.why_not() is not None
NOT_IN_A_LOAD = ("diagnose", "started", "stopped")
"""Hooks whose errors are dropped, or that no load calls."""
pytestmark = pytest.mark.slow
HOOKS = [
    (info.name, hook)
    for info in BUILT_IN
    for hook in info.hooks
    if hook not in NOT_IN_A_LOAD
    and not (info.name == "kbit" and NO_BITSANDBYTES)
    and not ((info.name, hook) == ("colossalai", "load") and NO_BOOSTER)
]


EVERY_WAY = "LLMLOAD_TEST_SABOTAGE" in os.environ
"""Whether each hook fails in every way, as in the long set; else each in one, and all in some."""


class SabotageError(RuntimeError):
    """What a hook did not mean to raise; of a context that it returned it comes as it is."""


class Sabotage:
    """Makes one hook of one plugin fail, before its own work or after it, and counts that."""

    def __init__(self, kind: type, hook: str, when: str, error: type[BaseException]) -> None:
        self.count = 0
        self._place = kind, hook
        self._when, self._error = when, error

    def _fail(self) -> None:
        self.count += 1
        raise self._error("sabotage")

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def sabotaged(*args: Any, **kwargs: Any) -> Any:
            if self._when == "before":
                self._fail()
            result = function(*args, **kwargs)
            if inspect.isgenerator(result):
                result = list(result)
            if self._when == "while entered" and hasattr(result, "__enter__"):
                return self._entered(result)
            return self._fail()

        return sabotaged

    @contextmanager
    def _entered(self, context: Any) -> Iterator[None]:
        with context:
            self._fail()
            yield

    def __enter__(self) -> Sabotage:
        kind, hook = self._place
        self._sound = getattr(kind, hook)
        setattr(kind, hook, self._around(self._sound))
        return self

    def __exit__(self, *_: object) -> None:
        setattr(*self._place, self._sound)


def load(name: str, hook: str, folder: str) -> None:
    spec = {"model": folder, **SPECS[name]}
    if (name, hook) == ("colossalai", "load"):  # else the streaming loader fills the model
        spec["colossalai"] = {"materialize": False}
    if hook == "relieve":  # only asked where there is too little memory
        llmload.plan(spec, machine=llmload.Machine(host_memory=1000))
        return
    block = {"streaming"} if hook == "load" and name != "streaming" else set()
    llmload.load(spec, registry=create_registry(block=block))


def state(name: str) -> dict[str, Any]:
    """Take a snapshot, of what is left when the threads that ranks talk with have ended."""
    taken = snapshot()
    while name == "zero3" and taken != (taken := later_snapshot()):
        pass
    return taken


def later_snapshot() -> dict[str, Any]:
    time.sleep(0.3)
    return snapshot()


def left_by(name: str, hook: str, folder: str, temporary: Path) -> list[str]:
    """Fail in every way in one hook; return what was changed by it."""
    tempfile.tempdir = str(temporary)
    (kind,) = (type(info.plugin) for info in BUILT_IN if info.name == name)
    found = []
    load(name, hook, folder)  # what libraries do once, at first use, is done
    for when, error in ways_of(name, hook):
        torch.manual_seed(11)
        before = state(name)
        with Sabotage(kind, hook, when, error) as sabotage:
            try:
                load(name, hook, folder)
            except (LoadFailedError, RequestError, SabotageError, KeyboardInterrupt):
                pass
            else:
                torch.manual_seed(11)  # it was only rehearsed, or never called
        told = changes(before, state(name))
        new = list(temporary.iterdir())
        if told or new or not sabotage.count:
            found.append(f"{when}, {error.__name__}, {sabotage.count} times: {told} {new}")
    return found


def ways_of(name: str, hook: str) -> list[tuple[str, type[BaseException]]]:
    moments = ("before", "after", *(["while entered"] if hook == "init_context" else []))
    ways = list(product(moments, (SabotageError, KeyboardInterrupt)))
    number = HOOKS.index((name, hook)) % len(ways)
    return ways if EVERY_WAY else ways[number : number + 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("sound") / "model", pad=True))


@pytest.mark.parametrize(("name", "hook"), HOOKS)
def test_an_error_in_any_hook_of_any_plugin_leaves_nothing_behind(
    name: str, hook: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "zero3":  # in a process of its own, for its process group stays
        # Where nothing was compiled before, DeepSpeed does so first.
        found = run_on_ranks(left_by, name, hook, folder, tmp_path, ranks=1, timeout=280.0)
        assert found == [[]]
    else:
        monkeypatch.setattr(tempfile, "tempdir", None)  # and is restored
        assert left_by(name, hook, folder, tmp_path) == []


def test_the_matrix_has_every_plugin() -> None:
    assert {info.name for info in BUILT_IN} == SPECS.keys()
