"""Every package under examples/plugins is built, installed and used; nothing here knows of it."""

from __future__ import annotations

import ast
import json
import shutil
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from environments import Environment, pip
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest depends on it there
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGES = {
    path.parent.name: tomllib.loads(path.read_text("utf-8"))
    for path in sorted((ROOT / "examples" / "plugins").glob("*/pyproject.toml"))
}
"""Folder, which is the distribution's name -> its ``pyproject.toml``."""
PUBLIC = {"llmload", "llmload.hookspecs", "llmload.plugin", "llmload.testing"}
OPTIONS = ("--no-deps", "--no-build-isolation", "--no-index")


def folder_of(package: str) -> Path:
    return ROOT / "examples" / "plugins" / package


def entry_points(package: str) -> dict[str, str]:
    """The package's plugins: name -> module and attribute."""
    found: dict[str, str] = PACKAGES[package]["project"]["entry-points"]["llmload"]
    return found


def is_satisfied(text: str) -> bool:
    requirement = Requirement(text)
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(found, prereleases=True)


TESTED_HERE = [
    package
    for package, project in PACKAGES.items()
    if all(map(is_satisfied, project["project"]["dependencies"]))
]
"""Those whose libraries are installed; ``nox -s example_plugins`` installs those of all."""


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment into which all of them were installed, built as wheels."""
    place = tmp_path_factory.mktemp("example_plugins")
    sources = [shutil.copytree(folder_of(package), place / package) for package in PACKAGES]
    pip(("wheel", *OPTIONS, "-w", str(place / "dist"), *map(str, sources)))
    environment = Environment(place / "used")
    environment.install(*sorted((place / "dist").glob("*.whl")))
    return environment


@pytest.mark.slow
def test_all_of_them_are_there_when_they_are_only_installed(
    used: Environment, tmp_path: Path
) -> None:
    found = json.loads(used.run("-m", "llmload", "plugins", "--json", cwd=tmp_path).stdout)
    plugins: list[dict[str, Any]] = found["plugins"]
    theirs = {
        info["name"]: (info["distribution"], info["status"])
        for info in plugins
        if info["distribution"].partition(" ")[0] in PACKAGES
    }
    assert theirs == {
        plugin: (f"{package} {project['project']['version']}", "active")
        for package, project in PACKAGES.items()
        for plugin in entry_points(package)
    }


@pytest.mark.slow
@pytest.mark.parametrize("package", TESTED_HERE)
def test_it_passes_its_own_tests_where_it_is_installed(
    used: Environment, tmp_path: Path, package: str
) -> None:
    """But for those that it marks as slow, which ``nox -s example_plugins`` runs too."""
    for name in ("README.md", "pyproject.toml", "tests"):  # not the package itself
        source, target = folder_of(package) / name, tmp_path / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if "markers" in PACKAGES[package]["tool"]["pytest"]["ini_options"]:
        words += ["-m", "not slow"]
    done = used.run(*words, cwd=tmp_path)
    assert "passed" in done.stdout
    assert "failed" not in done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_it_imports_of_llmload_what_any_plugin_may(package: str) -> None:
    others = {
        name
        for file in folder_of(package).rglob("*.py")
        for name in imported(ast.parse(file.read_text("utf-8")))
        if name.partition(".")[0] == "llmload"
    }
    assert others <= PUBLIC


def imported(tree: ast.AST) -> set[str]:
    """The modules that a file imports; ``from llmload import plugin`` imports that module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {node.module} | {name for name in names if is_a_module(name)}
    return found


def is_a_module(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.slow
def test_nothing_that_is_installed_as_llmload_names_one_of_them(tmp_path: Path) -> None:
    pip(("wheel", *OPTIONS, "-w", str(tmp_path), str(ROOT)))
    (wheel,) = tmp_path.glob("llmload-*.whl")
    words = {
        word.encode()
        for package in PACKAGES
        for word in (package, package.replace("-", "_"), *entry_points(package).values())
    }
    with zipfile.ZipFile(wheel) as archive:
        named = {
            (name, word)
            for name in archive.namelist()
            for word in words
            if word in archive.read(name) or word in name.encode()
        }
    assert named == set()


def test_each_of_them_is_described_where_authors_look() -> None:
    listed = (ROOT / "examples" / "plugins" / "README.md").read_text("utf-8")
    assert all(f"]({package}/README.md)" in listed for package in PACKAGES)
