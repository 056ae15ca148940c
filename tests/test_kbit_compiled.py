"""The C kernel for 4-bit quantisation: compiled once, kept, and done without where it cannot be."""

from __future__ import annotations

import pwd
import signal
from pathlib import Path

import pytest
import torch
from stacks import needs_kernel_handover

from llmload.builtin.kbit import compiled
from llmload.builtin.kbit.kernel import fast_quantisation

pytestmark = needs_kernel_handover


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "llmload"


def quantised_by(values: torch.Tensor) -> tuple[dict[str, int], str | None]:
    with fast_quantisation() as kernel:
        torch.ops.bitsandbytes.quantize_4bit.default(values, 64, "nf4", torch.uint8)
    assert kernel is not None
    return dict(kernel.values), kernel.not_compiled


def test_the_kernel_is_compiled_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantised_by(torch.randn(640)) == ({"compiled": 640}, None)
    (made,) = cache.iterdir()
    assert made.suffix == ".so"
    assert cache.stat().st_mode & 0o777 == 0o700
    monkeypatch.delattr(compiled, "_compile")
    assert quantised_by(torch.randn(640)) == ({"compiled": 640}, None)


def test_a_compiler_that_fails_leaves_nothing_behind(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "cc -no-such-option")
    counted, reason = quantised_by(torch.randn(640))
    assert counted == {"torch": 640}
    assert reason is not None
    assert "cc failed: " in reason
    assert "no-such-option" in reason
    assert list(cache.iterdir()) == []


def test_a_cache_folder_that_others_can_write_to_is_not_run_from(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    assert quantised_by(torch.randn(640)) == (
        {"torch": 640},
        f"others than this user can write to {str(cache)!r}",
    )


def test_what_cannot_be_loaded_is_done_without(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(compiler: list[str], file: Path) -> None:
        file.write_bytes(b"no library")

    monkeypatch.setattr(compiled, "_compile", spoil)
    counted, reason = quantised_by(torch.randn(640))
    assert counted == {"torch": 640}
    assert reason is not None
    assert reason.startswith(f"{cache}/kernel-")


def test_a_cache_folder_that_cannot_be_made_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    counted, reason = quantised_by(torch.randn(640))
    assert counted == {"torch": 640}
    assert reason is not None
    assert "Not a directory" in reason


def test_a_compiler_that_is_no_command_is_done_without(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", '"')
    counted, reason = quantised_by(torch.randn(640))
    assert counted == {"torch": 640}
    assert reason == "CC='\"' is no command: No closing quotation"


def test_without_any_home_folder_the_kernel_is_done_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    counted, reason = quantised_by(torch.randn(640))
    assert counted == {"torch": 640}
    assert reason == "Could not determine home directory."


# After an interrupt, `subprocess` waits for nobody, and warns of whom it has not waited for.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_leaves_nothing_of_the_compiler(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "slow-cc"
    # It waits for a moment, so that whoever started it waits for it.
    compiler.write_text(
        '#!/bin/sh\ntouch "$TMPDIR/part.s"\nsleep 2\nkill -INT $PPID\nexec sleep 600\n'
    )
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    # Where the tests are a shell's background job, Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            quantised_by(torch.randn(640))
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(cache.iterdir()) == []
