"""What is public, and that nothing else is needed to write a plugin."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmload
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


BUILTIN = Path(llmload.__file__).parent / "builtin"
FOLDERS = sorted(path.parent for path in BUILTIN.glob("*/plugin.py"))
PUBLIC = {
    "llmload": set(llmload.__all__),
    "llmload.hookspecs": {"hookimpl", "hookspec"},
    "llmload.plugin": set(llmload.plugin.__all__),
}


def imports_of_ours(source: str) -> Iterator[tuple[str, str]]:
    """Yield module and name of each import of llmload: in functions and for types alone too.

    A string that names a module of ours counts as its import.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module.partition(".")[0] in ("llmload", ""):
                yield from ((module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from ((name, "") for name in names if name.partition(".")[0] == "llmload")
        elif isinstance(node, ast.Constant) and re.match(r"llmload\.[\w.]*$", str(node.value)):
            yield "a string", str(node.value)


def private(source: str, own: str) -> list[str]:
    """Return what a plugin in the package ``own`` imports of llmload that is not public."""
    return [
        f"{module}: {name}"
        for module, name in imports_of_ours(source)
        if not (module == own or module.startswith(f"{own}.") or (module, name) == ("llmload", ""))
        and name not in PUBLIC.get(module, ())
        and not (module == "llmload.builtin" and name == own)
    ]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_built_in_plugin_imports_what_any_plugin_may(folder: Path) -> None:
    found = {
        str(file.relative_to(BUILTIN)): offending
        for file in folder.rglob("*.py")
        if (offending := private(file.read_text(), f"llmload.builtin.{folder.name}"))
    }
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "from llmload.context.context import LoadContext",
        "from llmload import plan_order",
        "from llmload.plugin import is_partitioned",
        "from llmload.builtin.lora.request import resolve",
        "from llmload.builtin import lora",
        "import llmload.hf.engine",
        "from ..lora import request",
        "if TYPE_CHECKING:\n    from llmload.errors import Problem",
        "def late():\n    from llmload.loading import audit",
        'module = importlib.import_module("llmload.hf.engine")',
        'module = importlib.import_module(f"llmload.hf.{name}")',
    ],
)
def test_the_rule_finds_what_is_not_public(line: str) -> None:
    assert len(private(line, "llmload.builtin.cast")) == 1


IMPORTING = {"import_module", "__import__"}
LAZY = {"__init__.py", "plugin.py", "testing/__init__.py"}
"""The modules whose names are fetched on first use, with an import for types beside each."""


def imported_by_string(source: str) -> list[str]:
    """Return what of ours is handed to a function that imports by name."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    called = [c for c in calls if ast.unparse(c.func).rpartition(".")[2] in IMPORTING]
    texts = [ast.unparse(argument) for call in called for argument in call.args]
    return [text for text in texts if re.match(r"f?['\"](llmload)?\.", text)]


def test_no_import_of_ours_hides_in_a_string() -> None:
    root = BUILTIN.parent
    found = {
        str(file.relative_to(root)): texts
        for file in root.rglob("*.py")
        if (texts := imported_by_string(file.read_text()))
    }
    assert found.keys() == LAZY, found


def test_every_built_in_plugin_is_looked_at() -> None:
    assert {"lora", "streaming", "zero3"} <= {folder.name for folder in FOLDERS}
