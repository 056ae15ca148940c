"""The pause of Python's garbage collector while a plan is made."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

import llmload
from llmload.loading.gc_pause import collection_paused
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
