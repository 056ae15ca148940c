"""What is public, and that nothing else is needed to write a plugin."""

from __future__ import annotations

import re
import subprocess
import sys

import llmload.plugin


def test_every_public_name_of_plugin_is_there_and_described() -> None:
    described = set(re.findall(r"``(\w+)``", llmload.plugin.__doc__ or ""))
    for name in llmload.plugin.__all__:
        assert getattr(llmload.plugin, name) is not None
        assert name in described, f"{name} has no word in the docstring"
    assert dir(llmload.plugin) == sorted(llmload.plugin.__all__)


def test_importing_the_public_surface_imports_no_library_of_models() -> None:
    heavy = {"torch", "transformers", "peft", "deepspeed", "numpy", "safetensors"}
    code = "import sys, llmload, llmload.plugin, llmload.hookspecs; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not heavy & set(found.stdout.split())
