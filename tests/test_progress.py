"""Progress bars: one place for ours and transformers', or none; given back afterwards."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from transformers.utils import logging

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
