"""Environments of their own, layered over the packages of the one that runs the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import llmload


class Environment:
    """A virtual environment that sees what is installed here, and in which more is installed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        venv.create(root, with_pip=False, symlinks=True)
        self.python = root / "bin" / "python"
        self.site = Path(sysconfig.get_path("purelib", vars={"base": str(root)}))
        below = [path for path in sys.path if path.endswith("-packages")]
        # Where llmload itself lies, if it is installed in place.
        below.append(str(Path(llmload.__file__).parent.parent))
        (self.site / "below.pth").write_text("\n".join(dict.fromkeys(below)))

    def install(self, *packages: Path) -> None:
        """Install folders or wheels as a user does, but for what needs a network."""
        options = ("--no-deps", "--no-build-isolation", "--no-index", "--prefix", str(self.root))
        pip(("install", *options, *map(str, packages)))

    def run(self, *words: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run this environment's Python, and return what it wrote."""
        # A coverage tool or a path of the tests' own has no place there.
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        done = subprocess.run(
            [str(self.python), *words],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done


def pip(words: tuple[str, ...], cwd: Path | None = None) -> None:
    """Run pip of the environment that runs the tests."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
