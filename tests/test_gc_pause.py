"""Python's search for garbage: none while a plan is made, of new objects while a model loads."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import llmload
from llmload.loading.gc_pause import collection_of_new_objects, collection_paused
from llmload.testing import tiny_llama


def test_collection_goes_on_after_a_plan_and_after_an_error(tmp_path: Path) -> None:
    seen = []

    class Looks:
        name = "looks"

        @llmload.hookimpl
        def check(self, ctx: llmload.LoadContext) -> list[llmload.Problem]:
            seen.append(gc.isenabled())
            return []

    registry = llmload.create_registry(plugins=[Looks()])
    llmload.plan({"model": str(tiny_llama(tmp_path))}, registry=registry)
    assert seen == [False]
    assert gc.isenabled()
    with pytest.raises(llmload.RequestError):
        llmload.plan({"model": str(tmp_path / "nothing")})
    assert gc.isenabled()


def test_a_callers_own_pause_stays() -> None:
    gc.disable()
    try:
        with collection_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


class Cycle:
    """Refers to itself, so that only a search finds that nobody else does."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def nothing_frozen() -> Iterator[None]:
    """The tests' own process has frozen what it imported, as few do."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("nothing_frozen")
@pytest.mark.parametrize("fails", [False, True])
def test_a_load_searches_what_is_made_in_it_and_nothing_else(fails: bool, tmp_path: Path) -> None:
    old = Cycle()
    before = weakref.ref(old)
    found = []

    class Looks:
        name = "looks"

        @llmload.hookimpl
        def post_load(self, ctx: llmload.LoadContext, model: nn.Module) -> nn.Module:
            nonlocal old
            if not ctx.rehearsing:
                del old
                made = weakref.ref(Cycle())
                gc.collect()
                found.append((made() is None, before() is None))
                if fails:
                    raise ValueError("after all")
            return model

    spec = {"model": str(tiny_llama(tmp_path))}
    registry = llmload.create_registry(plugins=[Looks()])
    if fails:
        with pytest.raises(llmload.LoadFailedError, match="after all"):
            llmload.load(spec, registry=registry)
    else:
        llmload.load(spec, registry=registry)
    assert found == [(True, False)]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert before() is None


@pytest.mark.usefixtures("nothing_frozen")
def test_what_a_caller_froze_stays_frozen() -> None:
    gc.freeze()
    with collection_of_new_objects(), collection_of_new_objects():
        pass
    assert gc.get_freeze_count() > 0
