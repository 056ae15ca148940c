"""A C kernel for 4-bit quantisation, compiled when it is first needed and if there is a compiler.

What was compiled is kept in the user's cache folder, under a name that depends on all it was made
from: ``$XDG_CACHE_HOME/llmload``, by default ``~/.cache/llmload``. The compiler is ``cc``, or what
the environment variable ``CC`` names; ``CC=false`` does without.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from llmload.plugin import LlmloadError

_SOURCE: Final = Path(__file__).with_name("_kernel.c")
# Rounding as in the source: no products and sums in one.
_FLAGS: Final = ("-O3", "-ffp-contract=off", "-fPIC", "-shared")
_DEADLINE_SECONDS: Final = 60


class NotCompiledError(LlmloadError):
    """There is no compiled kernel, for the reason given."""


def library() -> ctypes.CDLL:
    """Return the compiled kernel: ``quantise_DTYPE``, as declared in ``_kernel.c``.

    :raises NotCompiledError: it cannot be compiled or loaded here.
    """
    asked = os.environ.get("CC", "")
    try:
        command = shlex.split(asked) or ["cc"]
    except ValueError as error:
        raise NotCompiledError(f"CC={asked!r} is no command: {error}") from error
    compiler = shutil.which(command[0])
    if compiler is None:
        raise NotCompiledError(f"no C compiler {command[0]!r} is found")
    try:
        found = Path(compiler).resolve()
        made_from = [*command, *_FLAGS, str(found), found.stat().st_mtime_ns, platform.machine()]
        digest = hashlib.sha256(_SOURCE.read_bytes() + repr(made_from).encode()).hexdigest()
        file = _cache_folder() / f"kernel-{digest[:24]}.so"
        if not file.exists():
            _compile([compiler, *command[1:]], file)
        return ctypes.CDLL(str(file))
    # RuntimeError: there is no home folder at all.
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        raise NotCompiledError(str(error)) from error


def _cache_folder() -> Path:
    """Return a folder that nobody else can write to: what lies there is run."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(base).expanduser() / "llmload"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise NotCompiledError(f"others than this user can write to {str(folder)!r}")
    return folder


def _compile(compiler: list[str], file: Path) -> None:
    """Compile beside ``file`` and rename: other processes may be at it too."""
    # With the compiler's own temporary files, which it leaves where it is killed.
    with tempfile.TemporaryDirectory(dir=file.parent, ignore_cleanup_errors=True) as place:
        made = Path(place) / file.name
        done = subprocess.run(
            [*compiler, *_FLAGS, "-o", str(made), str(_SOURCE)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | {"TMPDIR": place},
            check=False,
            timeout=_DEADLINE_SECONDS,
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise NotCompiledError(f"{compiler[0]} failed: {said[0]}")
        made.replace(file)
