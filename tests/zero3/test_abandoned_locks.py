"""What DeepSpeed compiles on the way, and what a process leaves that was killed meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from llmload.errors import RequestError


def test_a_lock_that_a_killed_compiler_left_is_refused_instead_of_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmload.builtin.zero3 import process_group

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    process_group._refuse_abandoned_locks()  # somebody may be compiling
    long_ago = time.time() - 3600
    os.utime(lock, (long_ago, long_ago))
    with pytest.raises(RequestError) as refused:
        process_group.connect()
    assert str(refused.value) == (
        f"{lock}: zero3: a process that was killed while it compiled deepspeed_shm_comm for"
        " DeepSpeed has left a lock, on which every rank would wait for ever. Remove the folder"
        f" {str(lock.parent)!r}."
    )
