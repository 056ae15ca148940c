"""Progress bars: one place for ours and transformers', or none; given back afterwards."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from stacks import needs_transformers_5
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import llmload
from llmload.cli.progress import is_wanted, progress
from llmload.testing import tiny_checkpoint


class Terminal(io.StringIO):
    """A stream that remembers what a terminal would have shown."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1"}, False),
        ({"HF_HUB_DISABLE_PROGRESS_BARS": "1"}, False),
    ],
    ids=str,
)
def test_progress_is_for_the_first_rank_at_a_terminal(
    environ: dict[str, str], wanted: bool
) -> None:
    with redirect_stderr(Terminal()):
        assert is_wanted(json=False, environ=environ) is wanted
        assert not is_wanted(json=True, environ=environ)
    with redirect_stderr(io.StringIO()):
        assert not is_wanted(json=False, environ=environ)


def test_a_loop_is_shown_and_gives_what_it_was_given() -> None:
    with redirect_stderr(Terminal()) as terminal, progress(shown=True) as track:
        assert list(track(range(3), "counting")) == [0, 1, 2]
    assert "counting" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()


def test_a_loop_that_is_not_shown_gives_the_same() -> None:
    with redirect_stderr(Terminal()) as terminal, progress(shown=False) as track:
        assert list(track(range(3), "counting")) == [0, 1, 2]
    assert terminal.getvalue() == ""


@pytest.mark.skipif(not hasattr(logging, "set_tqdm_hook"), reason="came with transformers 5")
def test_loops_of_transformers_are_shown_in_the_same_place(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    with redirect_stderr(Terminal()) as terminal, progress(shown=True):
        AutoModelForCausalLM.from_pretrained(folder)
    assert "Loading weights" in terminal.getvalue()
    assert logging.set_tqdm_hook(None) is None


SILENT = """
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging
from llmload.cli.progress import progress

try:
    with progress(shown=False):
        assert are_progress_bars_disabled() and not logging.is_progress_bar_enabled()
        raise ZeroDivisionError
except ZeroDivisionError:
    assert logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
"""


def test_bars_of_transformers_and_the_hub_are_silent_and_given_back() -> None:
    # In a process of its own: the variable that keeps the tests free of bars is read at import.
    environ = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_PROGRESS_BARS"}
    subprocess.run([sys.executable, "-c", SILENT], check=True, env=environ)


# --- what takes long --------------------------------------------------------------------------


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show transformers' bars, which the tests do without."""
    monkeypatch.setattr(logging, "_tqdm_active", True)


def finished(said: str) -> list[str]:
    """The descriptions of the bars that were filled, in order: each ends its line once."""
    last = [line.rpartition("\r")[2] for line in said.split("\n")]
    return [text.partition(": 100%")[0] for text in last if ": 100%" in text]


LONG = {
    "as it is stored": ({}, ["Loading weights"]),
    "cast": ({"dtype": "bfloat16"}, ["Loading weights"]),
    "every value looked at": (
        {"verify": {"finite": True}}, ["Loading weights", "Looking for what is not finite"],
    ),
}  # fmt: skip


@pytest.mark.usefixtures("bars")
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_load_shows_a_line_for_each_long_work_on_the_first_rank(
    name: str,
    rank: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys, works = LONG[name]
    folder = tiny_checkpoint(tmp_path / "m")
    monkeypatch.setenv("RANK", rank)
    capfd.readouterr()
    llmload.load({"model": str(folder), **keys})
    assert finished(capfd.readouterr().err) == (works if rank == "0" else [])


@needs_transformers_5
@pytest.mark.usefixtures("bars")
def test_quantising_shows_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    capfd.readouterr()
    llmload.load({"model": str(folder), "kbit": {}, "lora": {}})
    assert finished(capfd.readouterr().err) == ["Loading weights"]


@pytest.mark.usefixtures("bars")
@pytest.mark.parametrize("rank", ["0", "1"])
def test_hashing_shows_one_line_where_it_is_made_held_to_and_compared(
    rank: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmload.host.registry import create_registry
    from llmload.loading import lock
    from llmload.loading.planning import prepare_to_load

    spec = {"model": str(tiny_checkpoint(tmp_path / "m"))}
    registry = create_registry()
    prepared = prepare_to_load(registry.validate(spec), registry)
    monkeypatch.setenv("RANK", rank)
    capfd.readouterr()
    made = lock.make(prepared)
    hashing = ["Hashing files"] if rank == "0" else []
    assert finished(capfd.readouterr().err) == hashing
    assert list(lock.wrong_weights(made, prepared)) == []
    assert finished(capfd.readouterr().err) == hashing
    lock.write(made, tmp_path / "lock")
    llmload.load({**spec, "lock": str(tmp_path / "lock")})
    loading = ["Loading weights"] if rank == "0" else []
    assert finished(capfd.readouterr().err) == loading + hashing


@pytest.mark.usefixtures("bars")
@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")  # of the tests' own variable
@pytest.mark.parametrize(
    ("command", "option", "shown"),
    [
        ("lock", (), True),
        ("lock", ("-q",), False),
        ("verify", (), True),
        ("verify", ("--json",), False),
        ("load", (), True),
        ("load", ("-q",), False),
    ],
)
def test_a_command_shows_it_at_a_terminal_unless_it_is_told_to_be_quiet(
    command: str,
    option: tuple[str, ...],
    shown: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from llmload.cli.commands import app

    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    folder, output = tiny_checkpoint(tmp_path / "m"), str(tmp_path / "lock")
    app(["lock", str(folder), "-o", output, "-q"], standalone_mode=False)
    more = {"lock": ["-o", output], "verify": ["--lock", output], "load": []}[command]
    logging._tqdm_active = True  # as before the first command, which could not give them back
    with redirect_stderr(Terminal()) as terminal:
        app([command, str(folder), *more, *option], standalone_mode=False)
    word = "Loading weights" if command == "load" else "Hashing files"
    assert (word in terminal.getvalue()) is shown
