"""Freezes what is public when a version is released, and sample plugins that are written for it.

``python tests/past_plugins/freeze.py`` makes the folder of the installed version. In it are
``surface.json``, every hook with its arguments and every public name with its attributes or
parameters, and a copy of the newest sample plugins, to be extended by what the version brought:
``expected.json`` is what ``use.py`` prints where they are installed. From then on
``tests/test_lasting.py`` holds every later version to all of it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import llmload
from llmload import hookspecs

HERE = Path(__file__).parent
_SET = re.compile(r"\bself\.([a-z]\w*)(?:: [^=\n]+)? = ")
MODULES = ("llmload", "llmload.hookspecs", "llmload.plugin", "llmload.testing")


def versions() -> list[str]:
    """The released versions that were frozen, oldest first."""
    found = [path.parent.name for path in HERE.glob("*/surface.json")]
    return sorted(found, key=lambda version: [int(part) for part in version.split(".")])


def surface() -> dict[str, Any]:
    """Return what is public of the llmload that can be imported here."""
    return {
        "hooks": {name: arguments(hook) for name, hook in sorted(hooks())},
        **{module: _names(module) for module in MODULES if module != "llmload.hookspecs"},
    }


def hooks() -> Iterator[tuple[str, Any]]:
    """Yield llmload's hooks, and those that built-in plugins declare."""
    registry = llmload.create_registry(environ={})
    declared = [getattr(i.plugin, "Hooks", None) for i in registry.plugins if i.builtin]
    for holder in (hookspecs, *filter(None, declared)):
        for name in dir(holder):
            if hasattr(getattr(holder, name), f"{hookspecs.PROJECT}_spec"):
                yield name, getattr(holder, name)


def arguments(hook: Any) -> list[str]:
    """Return the names of what a hook offers."""
    return list(inspect.signature(hook).parameters)


def _names(module: str) -> dict[str, list[str]]:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:  # it came later
        return {}
    return {name: members(getattr(found, name)) for name in sorted(found.__all__)}


def members(thing: Any) -> list[str]:
    """Return a class's public attributes, a function's parameters, or nothing."""
    if inspect.isclass(thing):
        own = {name for name in dir(thing) if not name.startswith("_")}
        for declared in ("model_fields", "__dataclass_fields__"):
            own |= set(getattr(thing, declared, ()))
        for base in thing.__mro__:
            with suppress(OSError, TypeError):  # made by a decorator, or in C
                own |= set(_SET.findall(inspect.getsource(vars(base).get("__init__"))))
        inherited = [dir(base) for base in (BaseModel, Exception) if issubclass(thing, base)]
        return sorted(own.difference(*inherited))
    if inspect.isroutine(thing):
        return list(inspect.signature(thing).parameters)
    return []


def main() -> None:
    version, frozen = llmload.__version__, versions()
    folder = HERE / version
    if folder.exists():
        sys.exit(f"{folder} is there already: a version is frozen once")
    if frozen:
        shutil.copytree(HERE / frozen[-1], folder)
        project = folder / "pyproject.toml"
        project.write_text(project.read_text("utf-8").replace(frozen[-1], version), "utf-8")
    else:
        folder.mkdir()
    text = json.dumps(surface(), indent=1)
    # A name and its members on one line.
    text = re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    (folder / "surface.json").write_text(f"{text}\n", encoding="utf-8")
    print(folder)


if __name__ == "__main__":
    main()
