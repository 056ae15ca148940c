"""Which versions of transformers and of the other libraries are supported, and that both lines of
transformers answer every question."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import llmload
from llmload.errors import PluginError
from llmload.hf import v4_51, v5
from llmload.hf.interface import Transformers
from llmload.hf.versions import installed_transformers, refuse_unsupported
from llmload.host import tested
from llmload.host.registry import create_registry
from llmload.loading import planning
from llmload.testing import tiny_llama

SUPPORTED = ["4.51.3", "4.57.6", "5.3.0", "5.15.1", "5.24.0", "5.25.0.dev0"]
REFUSED = ["4.51.2", "4.49.0", "5.0.0rc1", "5.0.0", "5.2.0", "6.0.0", "1", "unknown"]


@pytest.mark.parametrize("version", SUPPORTED)
def test_a_supported_version_is_let_pass(version: str) -> None:
    refuse_unsupported(version)


@pytest.mark.parametrize("version", REFUSED)
def test_another_version_is_refused_by_name(version: str) -> None:
    with pytest.raises(PluginError) as caught:
        refuse_unsupported(version)
    assert str(caught.value) == (
        f"transformers {version} is installed, and llmload supports 4.51.3 and newer below 5, or"
        " 5.3 and newer below 6. Install one of them, such as `pip install 'transformers>=5.3,<6'`."
    )


def ours(library: str = "transformers") -> SpecifierSet:
    asked = [Requirement(text) for text in metadata.requires("llmload") or ()]
    return next(one.specifier for one in asked if one.name == library)


def test_what_pip_may_install_is_what_is_supported() -> None:
    assert all(ours().contains(version, prereleases=True) for version in SUPPORTED)
    assert not any(ours().contains(version, prereleases=True) for version in REFUSED[:-1])


def test_the_table_of_versions_is_held_to_what_is_refused_and_to_the_loader_here(
    tmp_path: Path,
) -> None:
    for version, loader in tested.TRANSFORMERS.items():
        assert ours().contains(version) == (loader != "refused"), version
    here = metadata.version("transformers")
    loaded = llmload.load({"model": str(tiny_llama(tmp_path))})
    assert loaded.report.loader == tested.TRANSFORMERS[here]
    assert next(iter(tested.TRANSFORMERS)) == tested.STACKS["modern"]["transformers"]


@pytest.mark.parametrize("library", tested.LIBRARIES)
def test_the_table_of_libraries_is_held_to_what_is_asked_for_and_to_the_modern_stack(
    library: str,
) -> None:
    oldest, newest = map(Version, tested.LIBRARIES[library])
    builtin = [info.plugin for info in create_registry().plugins if info.builtin]
    needs = [Requirement(text) for plugin in builtin for text in getattr(plugin, "requires", ())]
    asked = [need.specifier for need in needs if need.name == library]
    assert asked
    for clause in (clause for each in (ours(library), *asked) for clause in each):
        assert (clause.operator, Version(clause.version)) == (">=", oldest)
    pinned = (Path(__file__).parent.parent / "constraints/modern.txt").read_text()
    assert f"\n{library}=={newest}\n" in pinned


@pytest.fixture
def _asked_anew() -> Iterator[None]:
    """The line of the installed version is chosen again, before the test and after it."""
    installed_transformers.cache_clear()
    yield
    installed_transformers.cache_clear()


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.parametrize(
    ("version", "line"), [("4.51.3", v4_51), ("4.57.6", v4_51), ("5.3.0", v5), ("5.24.0", v5)]
)
def test_each_version_has_its_line(
    version: str, line: Transformers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    assert installed_transformers() is line
    assert installed_transformers() is line


def test_the_lines_have_every_function_and_no_other() -> None:
    asked = {name for name in vars(Transformers) if not name.startswith("_")}
    assert set(v5.__all__) == set(v4_51.__all__) == asked


def test_a_load_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama(tmp_path)
    (tmp_path / "config.json").write_text("not read")
    monkeypatch.setattr(planning, "version_of", lambda name: "5.0.0")
    with pytest.raises(PluginError, match=re.escape("transformers 5.0.0 is installed")):
        llmload.plan({"model": str(tmp_path)})
