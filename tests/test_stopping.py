"""Signals on the command line: the exit code, what is said, and that nothing is left."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmload.testing import tiny_checkpoint

SEED = 20
MOMENTS = int(os.environ.get("LLMLOAD_TEST_INTERRUPTS", "4"))
"""How many random moments: more in ``nox -s long_trust``."""

TOP = "import os, signal, time\ndef stop(number=signal.SIGINT): os.kill(os.getpid(), number)\n"
PLUGIN = """
class Plugin:
    name = 'stopping'
    def __init__(self):
        while not os.environ.get('GOES_ON'):
            time.sleep(1)
"""


def hear() -> None:
    """Let a new process hear what a shell's background jobs, and those of `nohup`, ignore."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run(place: Path, *words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line where a module ``stopping`` has the code, with folders of its own."""
    (place / "stopping.py").write_text(TOP + code + PLUGIN)
    return subprocess.run(
        [sys.executable, "-m", "llmload", *words],
        env=environment(place) | {"PYTHONPATH": str(place)},
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=hear,
    )


def environment(place: Path) -> dict[str, str]:
    for name in ("home", "tmp"):
        (place / name).mkdir(exist_ok=True)
    return {**os.environ, "HOME": str(place / "home"), "TMPDIR": str(place / "tmp")}


def left(place: Path) -> list[Path]:
    return [path for name in ("home", "tmp") for path in (place / name).rglob("*")]


SELECTED = ("plugins", "-p", "stopping:Plugin")


@pytest.mark.parametrize(
    ("name", "exit_code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)]
)
def test_a_signal_ends_a_command_in_silence_with_its_own_exit_code(
    name: str, exit_code: int, tmp_path: Path
) -> None:
    done = run(tmp_path, *SELECTED, code=f"stop(signal.{name})")
    assert (done.returncode, done.stdout, done.stderr) == (exit_code, "", "")
    assert left(tmp_path) == []


def test_what_is_being_imported_is_imported_first(tmp_path: Path) -> None:
    done = run(tmp_path, *SELECTED, code="stop()\nopen('imported', 'w').close()")
    assert (done.returncode, done.stderr) == (130, "")
    assert (tmp_path / "imported").exists()


def test_an_import_that_takes_long_is_not_waited_for(tmp_path: Path) -> None:
    done = run(tmp_path, *SELECTED, code="stop()\ntime.sleep(600)")
    assert (done.returncode, done.stderr) == (130, "")


def test_an_interrupt_while_our_own_first_modules_are_imported_is_answered(tmp_path: Path) -> None:
    (tmp_path / "pydantic.py").write_text(TOP + "stop()\ntime.sleep(600)")
    done = run(tmp_path, "plugins")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_no_exception_is_raised_below_the_cpp_of_torch_which_would_abort(tmp_path: Path) -> None:
    code = """
try:
    exec("stop()\\ntime.sleep(600)", {"__name__": "torch.slow", "stop": stop, "time": time})
except BaseException:
    open('raised', 'w').close()
"""
    done = run(tmp_path, *SELECTED, code=code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert not (tmp_path / "raised").exists()


SWALLOWED = {
    "an except that takes everything": "\ntry:\n    stop()\n    time.sleep(600)\nexcept: pass\n",
    "a destructor": """
class Dying:
    def __del__(self):
        stop()
        time.sleep(600)
Dying()
""",
}


@pytest.mark.parametrize("name", SWALLOWED)
def test_an_interrupt_that_somebody_swallows_comes_again(name: str, tmp_path: Path) -> None:
    done = run(tmp_path, *SELECTED, code=SWALLOWED[name])
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_second_ctrl_c_waits_for_what_is_tidied_up(tmp_path: Path) -> None:
    code = """
try:
    stop()
    time.sleep(600)
finally:
    stop()
    time.sleep(0.2)
    open('tidied', 'w').close()
"""
    done = run(tmp_path, *SELECTED, code=code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert (tmp_path / "tidied").exists()


def test_a_signal_that_the_process_was_started_to_ignore_is_ignored(tmp_path: Path) -> None:
    run(tmp_path, "--version", code="stop(signal.SIGHUP)")
    done = subprocess.run(
        ["nohup", sys.executable, "-m", "llmload", *SELECTED],
        env=environment(tmp_path) | {"PYTHONPATH": str(tmp_path), "GOES_ON": "1"},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0


def test_an_interrupt_at_any_moment_ends_a_load_and_leaves_nothing(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", pad=True)
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"model: {folder}\nlora: {{r: 2}}\nembeddings: {{pad_to_multiple_of: 8}}\n")
    command = [sys.executable, "-m", "llmload", "load", str(spec)]
    began = time.monotonic()
    subprocess.run(command, env=environment(tmp_path), capture_output=True, check=True)
    seconds = time.monotonic() - began
    moments, late, ended = random.Random(SEED), 0, []
    for _ in range(MOMENTS):
        process = subprocess.Popen(
            command,
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=hear,
        )
        # Python itself takes a moment to start, in which it answers for itself.
        time.sleep(0.3 + moments.random() * (seconds - 0.3))
        if process.poll() is not None:
            seconds *= 0.9  # the machine has become faster
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        _, said = process.communicate()
        ended.append(time.monotonic() - sent)
        late += process.returncode == 0
        assert process.returncode in (130, 0), said
        assert "Traceback" not in said
        assert left(tmp_path) == []
    record_property(
        "figure",
        f"{MOMENTS} interrupts, {late} after the end: exit 130, no traceback, nothing left; the"
        f" slowest ended after {max(ended):.1f} s",
    )
