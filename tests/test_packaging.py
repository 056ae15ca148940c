"""What is installed with llmload, what is pinned, and that the files that say so agree."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import llmload
from llmload import create_registry

ROOT = Path(__file__).parent.parent
CORE = {"packaging", "pluggy", "pydantic", "pyyaml", "regex", "rich", "typer"}
EXTRAS = {"all", "bitsandbytes", "colossalai", "deepspeed", "hf", "signing"}


def requirements(extra: str = "") -> list[Requirement]:
    """What the installed distribution asks for, by itself or with one extra."""
    found = [Requirement(text) for text in metadata.requires("llmload") or ()]
    if not extra:
        return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [r for r in found if r.marker is not None and r.marker.evaluate({"extra": extra})]


def pins(stack: str = "modern") -> dict[str, Version]:
    """A stack's versions for this Python."""
    lines = (ROOT / "constraints" / f"{stack}.txt").read_text().splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (exact,) = requirement.specifier
            assert exact.operator == "=="
            if requirement.marker is None or requirement.marker.evaluate():
                found[requirement.name] = Version(exact.version)
    return found


def test_the_core_needs_no_ml_library() -> None:
    assert {requirement.name for requirement in requirements()} == CORE


def test_the_extras_are_those_of_the_stacks() -> None:
    assert set(metadata.metadata("llmload").get_all("Provides-Extra") or ()) == EXTRAS
    assert {r.name for r in requirements("hf")} >= {"torch", "transformers", "peft"}
    assert {r.name for r in requirements("deepspeed")} >= {"deepspeed", "torch"}


@pytest.mark.parametrize("extra", ["", "hf", "deepspeed", "bitsandbytes", "signing"])
def test_the_modern_stack_is_pinned_and_within_what_is_asked_for(extra: str) -> None:
    names = {name.lower(): version for name, version in pins().items()}
    for requirement in requirements(extra):
        assert requirement.specifier.contains(names[requirement.name.lower()])


@pytest.mark.parametrize("stack", ["modern", "colossalai"])
def test_what_is_installed_is_what_is_pinned(stack: str) -> None:
    wanted = pins(stack)
    pytest.importorskip("torch", reason="no stack is installed")
    if Version(metadata.version("torch")).public != str(wanted["torch"]):
        pytest.skip(f"another stack than {stack} is installed")
    others = {}
    for name, version in wanted.items():
        try:
            found = Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue  # tools that only some sessions install
        # The session for the oldest pluggy changes that one; a local version is the same release.
        if name != "pluggy" and found.public != str(version):
            others[name] = str(found)
    assert others == {}


def test_the_version_is_said_once() -> None:
    assert metadata.version("llmload") == llmload.__version__


def test_types_and_licence_are_installed() -> None:
    files = [str(path) for path in metadata.files("llmload") or ()]
    assert Path(llmload.__file__).with_name("py.typed").is_file()
    assert any(name.endswith("licenses/LICENSE") for name in files)
    assert metadata.metadata("llmload")["License-Expression"] == "Apache-2.0"


def test_every_built_in_plugin_is_installed_by_its_entry_point() -> None:
    entries = metadata.entry_points(group="llmload")
    built_in = {entry.name for entry in entries if entry.value.startswith("llmload.builtin.")}
    assert built_in == {info.name for info in create_registry().plugins if info.builtin}
    assert {info.status for info in create_registry().plugins} == {"active"}


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_an_example_is_valid(file: Path) -> None:
    text = file.read_text()
    assert text.startswith("# yaml-language-server: $schema=llmload.schema.json\n")
    registry = create_registry()
    if "\nmodels:\n" in text:
        assert registry.validate_group(file).models
    else:
        assert registry.validate(file).model
