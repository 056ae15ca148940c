"""Fixtures that several test modules share."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import late
import pytest

from llmload.cli import demo
from llmload.testing import ranks

# No test may reach for a hub, and progress bars have no place in captured output.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


_reached: list[str] = []
"""Hosts elsewhere that a test tried to reach, or asked a name server about."""
_HERE = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "", None, socket.gethostname())


def _stay_here(event: str, arguments: tuple[Any, ...]) -> None:
    """Let nothing in this process reach any network: a hook that audits the interpreter."""
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in _HERE and not str(host).startswith("127."):
        _reached.append(str(host))
        raise OSError(f"a test asked for {host}")


sys.addaudithook(_stay_here)


@pytest.fixture(autouse=True)
def _no_test_reaches_a_network() -> Iterator[None]:
    _reached.clear()
    yield
    assert _reached == []


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of all later searches for garbage, half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _the_plan_says_what_the_load_refuses(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Hold the plan to every refusal of every test, on ranks too: a load whose plan has no error is
    not refused. What audits find, tests mark by hand.

    A test that is about one of the few that only a load can tell is marked ``refused_late``; jobs
    of ``zero3.farm`` say so of themselves.
    """
    outcomes = ranks.outcomes
    may_be_late = request.node.get_closest_marker("refused_late") is not None

    def held_outcomes(function: Any, *args: Any, **options: Any) -> Any:
        if not may_be_late:
            function = functools.partial(late.held, function)
        return outcomes(function, *args, **options)

    monkeypatch.setattr(ranks, "outcomes", held_outcomes)
    with late.watched() as found:
        yield
    if not may_be_late:
        assert not found, f"the plan had no error, and the load was refused: {found[0]}"


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a short demo leaves behind, trained for five steps."""
    folder = tmp_path_factory.mktemp("kept") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        demo.make_model(Path("demo/model"), steps=5, track=lambda items, description: items)
        demo.write_spec(Path("demo"))
    return folder


@pytest.fixture
def kept_demo(demo_model: Path, tmp_path: Path) -> Path:
    """A working directory with copies of it, as ``demo``, and of the repository's examples."""
    shutil.copytree(demo_model, tmp_path / "demo")
    shutil.copytree(Path(__file__).parent.parent / "examples", tmp_path / "examples")
    return tmp_path
