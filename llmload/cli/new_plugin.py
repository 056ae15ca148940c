"""Writes a new plugin: an installable package that works as it stands, to be changed."""

from __future__ import annotations

import keyword
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llmload.errors import RequestError
from llmload.host.distributions import version_of
from llmload.saving.writing import new_folder, refused
from llmload.spec.loadspec import LoadSpec
from llmload.spec.suggest import nearest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llmload.host.registry import Registry

KINDS: Final = ("model", "lora-layer", "loader")
"""A plugin that changes the loaded model, one that adapts layers, one that loads."""

_COMMON: Final = {
    "pyproject.toml": "pyproject.toml.in",
    "noxfile.py": "noxfile.py.in",
    ".gitignore": "gitignore.in",
    ".github/workflows/tests.yml": "ci.yml.in",
    "llmload_my_plugin/__init__.py": "init.py.in",
}
_OF_KIND: Final = {
    "README.md": "README.md.in",
    "llmload_my_plugin/section.py": "section.py.in",
    "llmload_my_plugin/plugin.py": "plugin.py.in",
    "tests/test_my_plugin.py": "test.py.in",
}
"""File of the new package -> its template, whose names are those of a plugin ``my_plugin``."""


def write(name: str, folder: Path | None, kind: str, registry: Registry) -> dict[str, str]:
    """Write the package of a new plugin, and return each file's path -> what is in it.

    :param name: of the plugin, which is its key in a spec.
    :param folder: to be made; by default named after the distribution, where the command runs.
    :param registry: of the plugins that are there, whose names are taken.
    :raises RequestError: the name or the folder cannot be had; nothing was written.
    """
    _refuse_name(name, registry)
    if kind not in KINDS:
        raise RequestError(
            f"{kind!r} is no kind of plugin",
            fix=nearest(kind, KINDS) or f"Write one of {', '.join(KINDS)}.",
            where="--kind",
        )
    folder = folder or Path(_distribution(name))
    if folder.exists():
        raise RequestError(
            "the folder of the new plugin is there already",
            fix="Name another with `--dir`, or remove it.",
            where=str(folder),
        )
    files = {target: _filled(template, name) for target, template in _templates(kind).items()}
    written = {}
    with new_folder(folder), refused(folder):
        for target, text in files.items():
            path = folder / target.replace("my_plugin", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            written[str(path)] = text
    return written


def _refuse_name(name: str, registry: Registry) -> None:
    wanted = name.lower().replace("-", "_")
    if not wanted.isascii() or not wanted.isidentifier() or keyword.iskeyword(wanted):
        raise RequestError(
            f"{name!r} cannot be the name of a plugin, which is a key in specs and names a module",
            fix="Choose a word of lower-case letters, digits and underscores.",
            where="NAME",
        )
    if name != wanted:
        raise RequestError(
            f"{name!r} has other signs than lower-case letters, digits and underscores",
            fix=f"Write {wanted!r}.",
            where="NAME",
        )
    if name in LoadSpec.model_fields:
        raise RequestError(
            f"{name!r} is a core key of a spec", fix="Choose another name.", where="NAME"
        )
    taken = [info for info in registry.plugins if info.name == name]
    if taken:
        raise RequestError(
            f"{taken[0].distribution} has a plugin {name!r} already",
            fix="Choose another name: a plugin cannot replace another.",
            where="NAME",
        )


def _templates(kind: str) -> dict[str, str]:
    folder = kind.replace("-", "_")
    found = {target: f"{folder}/{template}" for target, template in _OF_KIND.items()}
    if kind == "lora-layer":
        found["llmload_my_plugin/layers.py"] = f"{folder}/layers.py.in"
    return _COMMON | found


def _filled(template: str, name: str) -> str:
    folder = resources.files("llmload.cli") / "template"
    text = folder.joinpath(template).read_text("utf-8")
    for old, new in _names(name):
        text = text.replace(old, new)
    return text.replace("LLMLOAD_VERSION", version_of("llmload") or "")


def _names(name: str) -> Iterable[tuple[str, str]]:
    yield "llmload-my-plugin", _distribution(name)
    yield "MyPlugin", "".join(part.capitalize() for part in name.split("_"))
    yield "my_plugin", name


def _distribution(name: str) -> str:
    return f"llmload-{name.replace('_', '-')}"
