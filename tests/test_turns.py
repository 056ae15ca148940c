"""Loads of one process take turns: libraries build models through state of the whole process."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import llmload
from llmload import SpecError, create_registry, hookimpl
from llmload.loading import turns
from llmload.testing import snapshot, tiny_checkpoint

DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("turns"))


def load(folder: Path, dtype: str, **keys: Any) -> llmload.LoadResult:
    return llmload.load({"model": str(folder), "dtype": dtype, **keys})


@pytest.mark.parametrize("options", [{}, {"select": ["no:streaming"]}], ids=["streaming", "plain"])
def test_threads_that_load_at_once_get_each_the_dtype_they_asked_for(
    folder: Path, options: dict[str, Any]
) -> None:
    registry = create_registry(**options)
    load(folder, "float32")  # what libraries do once is not of interest
    before = snapshot()

    def task(number: int) -> set[torch.dtype]:
        spec = {"model": str(folder), "dtype": DTYPES[number % 3]}
        if number % 4 == 3:
            llmload.plan(spec, registry=registry)
        model = llmload.load(spec, registry=registry).model
        return {parameter.dtype for parameter in model.parameters()}

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(task, range(24)))
    assert found == [{getattr(torch, DTYPES[number % 3])} for number in range(24)]
    after = snapshot()
    assert {key for key in before if before[key] != after[key]} <= {"threads"}


def test_groups_take_turns_too(folder: Path) -> None:
    def task(dtype: str) -> set[torch.dtype]:
        members = {
            "policy": {"model": str(folder), "dtype": dtype},
            "reference": {"like": "policy", "trainable": False},
        }
        group = llmload.load_group({"models": members})
        return {p.dtype for result in group.values() for p in result.model.parameters()}

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(task, DTYPES)) == [{getattr(torch, dtype)} for dtype in DTYPES]


def waits(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if " waits for another load " in message]


def test_a_load_that_waits_says_for_what(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    inside, leave = threading.Event(), threading.Event()

    class Slow:
        name = "slow"

        @hookimpl
        def post_load(self, ctx: Any, model: Any) -> Any:
            if not ctx.rehearsing:
                inside.set()
                leave.wait(60)
            return model

    registry = create_registry([Slow])

    def first() -> None:
        llmload.load({"model": str(folder)}, registry=registry)

    with caplog.at_level(logging.INFO, "llmload"), ThreadPoolExecutor(2) as pool:
        slow = pool.submit(first)
        assert inside.wait(60)
        waiting = pool.submit(load, folder, "bfloat16")
        with pytest.raises(SpecError):  # a wrong spec is refused at once
            load(folder, "float64")
        while not (told := waits(caplog)) and not waiting.done():
            time.sleep(0.01)
        leave.set()
        slow.result()
        waiting.result()
    assert told[0].startswith(
        f"the load of '{folder}' waits for another load of this process: the load of '{folder}',"
        " in thread 'ThreadPoolExecutor"
    )


def test_a_plugin_loads_another_model_from_its_hook(folder: Path) -> None:
    class Judge:
        name = "judge"

        @hookimpl
        def post_load(self, ctx: Any, model: Any) -> Any:
            if not ctx.rehearsing:
                ctx.keep_alive(load(folder, "bfloat16").model)
            return model

    result = llmload.load({"model": str(folder)}, registry=create_registry([Judge]))
    assert result.model.dtype == torch.float32
    assert [kept.dtype for kept in result.kept_alive] == [torch.bfloat16]


def test_a_failed_load_gives_the_turn_back(folder: Path) -> None:
    class Broken:
        name = "broken"

        @hookimpl
        def load(self, ctx: Any) -> Any:
            raise OSError("no")

    registry = create_registry([Broken], select=["no:streaming"])
    with pytest.raises(llmload.LoadFailedError):
        llmload.load({"model": str(folder)}, registry=registry)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(load, folder, "float32").result(60).model.dtype == torch.float32


def _load_in_child(folder: str, answer: Any) -> None:
    torch.set_num_threads(1)
    answer.put(str(load(Path(folder), "bfloat16").model.dtype))


def test_a_process_forked_while_another_thread_loads_can_load(folder: Path) -> None:
    load(folder, "float32")
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with turns.taken("a load"):
            held.set()
            leave.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(60)
    child = context.Process(target=_load_in_child, args=(str(folder), answer))
    child.start()
    assert answer.get(timeout=120) == "torch.bfloat16"
    child.join(60)
    leave.set()
    holder.join()


def test_a_loaded_model_can_be_copied_pickled_shared_and_used_after_a_fork(folder: Path) -> None:
    model = load(folder, "float32").model
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(ids).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(ids).logits, expected)
        model.share_memory()
        assert torch.equal(model(ids).logits, expected)
