"""What lasts: plugins of past versions work, what was public is there or went with a warning."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from types import MappingProxyType
from typing import Any

import faulty_plugins
import pytest
from environments import Environment, pip
from faulty_plugins import AsksAsBefore
from past_plugins import freeze
from snippets import ROOT

import llmload
from llmload import hookspecs, leaving, plugin, testing
from llmload.leaving import LEAVING, Leaving, LeavingWarning
from llmload.testing import FakeDistributions, tiny_llama

PAST = Path(freeze.__file__).parent
PAGE = (ROOT / "docs" / "reference" / "versions.md").read_text(encoding="utf-8")
NOT_FOR_PLUGINS = {"llmload: LoadContext.for_loading"}
"""What stood in public classes for the host alone."""


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


BEING_MADE = max(re.findall(r"^\| (\d+\.\d+\.\d+) \|", PAGE, re.MULTILINE), key=number)


# --- plugins of past versions -------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("model")))


def test_every_released_version_was_frozen() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changes, re.MULTILINE)
    assert sorted(released, key=number) == freeze.versions()


@pytest.mark.slow
@pytest.mark.parametrize("version", freeze.versions())
def test_plugins_of_a_past_version_do_what_they_did_and_no_new_argument_breaks_them(
    tmp_path: Path, folder: str, version: str
) -> None:
    source = shutil.copytree(PAST / version, tmp_path / "source")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path / "dist"))
    pip(("wheel", *options, str(source)))
    environment = Environment(tmp_path / "environment")
    environment.install(*(tmp_path / "dist").glob("*.whl"))

    expected = json.loads((source / "expected.json").read_text())
    use = (str(source / "use.py"), folder)
    assert json.loads(environment.run(*use, cwd=tmp_path).stdout) == expected

    (environment.site / "later.pth").write_text(str(PAST))
    later = ("-c", LATER, *use)
    done = environment.run(*later, cwd=tmp_path)
    assert json.loads(done.stdout) == expected
    assert "post_load was given 1" in done.stderr


LATER = """
import runpy, sys, os
import later
later.add_an_argument_to_every_hook()
os.environ["LLMLOAD_PLUGINS"] = "later:TakesIt"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# --- what was public ----------------------------------------------------------------------------


def lost(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """Return what one surface has that a later one lacks: ``module: name`` or ``module: a.b``."""
    found = set()
    for module, names in before.items():
        there = now.get(module, {})
        found |= {f"{module}: {name}" for name in names.keys() - there.keys()}
        for name in names.keys() & there.keys():
            gone = set(names[name]) - set(there[name])
            found |= {f"{module}: {name}.{member}" for member in gone}
    return found


@pytest.mark.parametrize("version", freeze.versions())
def test_nothing_public_went_without_a_release_that_warned(version: str) -> None:
    before = json.loads((PAST / version / "surface.json").read_text())
    for gone in sorted(lost(before, freeze.surface()) - NOT_FOR_PLUGINS):
        module, _, name = gone.partition(": ")
        entry = LEAVING.get(name) or LEAVING.get(f"{module}.{name}")
        assert entry is not None, f"{gone} was public in {version}; see llmload/leaving.py"
        assert number(entry.gone) <= number(BEING_MADE), f"{gone} went before {entry.gone}"
        assert entry.warns in freeze.versions(), f"no release has warned of {gone}"


def test_a_loss_is_seen() -> None:
    before = {"hooks": {"check": ["ctx", "old"], "went": []}, "llmload": {"A": ["b"], "C": []}}
    now = {"hooks": {"check": ["ctx", "new"]}, "llmload": {"A": [], "D": []}}
    told = {"hooks: check.old", "hooks: went", "llmload: A.b", "llmload: C"}
    assert lost(before, now) == told


def test_what_leaves_is_listed_and_leaves_after_a_release_that_warns() -> None:
    (section,) = re.findall(r"^## Leaving\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    rows = re.findall(r"^\| `(.+?)` \| (\S+) \| (\S+) \| (.*?) \|$", section, re.MULTILINE)
    assert {name: Leaving(*rest) for name, *rest in rows} == dict(LEAVING)
    for entry in LEAVING.values():
        assert number(entry.warns) < number(entry.gone)
        assert number(entry.warns) <= number(BEING_MADE)
        assert re.fullmatch(r"[A-Z].*\.", entry.instead)


# --- how it warns -------------------------------------------------------------------------------


@pytest.fixture
def goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a hook, an argument and a name of each public module leave."""
    names = ("check", "check.ctx", "llmload.Note", "llmload.plugin.some", "llmload.testing.IDS")
    entry = Leaving("0.2.0", "0.3.0", "Use another.")
    monkeypatch.setattr(leaving, "LEAVING", MappingProxyType(dict.fromkeys(names, entry)))


@pytest.mark.parametrize(
    ("module", "name"), [(llmload, "Note"), (plugin, "some"), (testing, "IDS")]
)
@pytest.mark.usefixtures("goes")
def test_a_name_that_goes_warns_everybody_who_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    monkeypatch.delitem(vars(module), name, raising=False)  # fetched before it was to go
    for _ in range(2):
        with pytest.warns(LeavingWarning) as caught:
            assert getattr(module, name) is not None
        full = f"{module.__name__}.{name}"
        assert str(caught[0].message) == f"`{full}` goes with llmload 0.3.0. Use another."
        assert caught[0].filename == __file__


def test_a_name_that_went_is_refused_with_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Leaving("0.2.0", "0.3.0", "Use another.")
    for module in (llmload, plugin, testing):
        gone = {f"{module.__name__}.went": entry}
        monkeypatch.setattr(leaving, "LEAVING", MappingProxyType(gone))
        words = f"module '{module.__name__}' has no attribute 'went': it went with llmload 0.3.0."
        with pytest.raises(AttributeError, match=re.escape(f"{words} Use another.")):
            module.went  # noqa: B018
        with pytest.raises(AttributeError, match=r"has no attribute 'never'$"):
            module.never  # noqa: B018


class Checks:
    name = "checks"

    @llmload.hookimpl
    def check(self, ctx: Any) -> Any:
        yield llmload.Note(text="here")


@pytest.mark.parametrize("what", ["check", "check.ctx"])
@pytest.mark.usefixtures("goes")
def test_a_hook_or_an_argument_that_goes_warns_where_the_plugin_implements_it(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    options = dict(getattr(hookspecs.check, "llmload_spec"))  # noqa: B009
    if what == "check":
        options["warn_on_impl"] = leaving.warning(what)
    else:
        options["warn_on_impl_args"] = {"ctx": leaving.warning(what)}
    monkeypatch.setattr(hookspecs.check, "llmload_spec", options)
    registry = llmload.create_registry([Checks], autoload=False, environ={})
    with pytest.warns(LeavingWarning) as caught:
        registry.activate(llmload.LoadSpec(model="m"))
    mine = [one for one in caught if one.filename == __file__]
    assert str(mine[0].message).endswith(f"`{what}` goes with llmload 0.3.0. Use another.")


def test_the_context_still_has_what_goes_and_says_so(folder: str) -> None:
    registry = llmload.create_registry([AsksAsBefore], environ={})
    with pytest.warns(LeavingWarning) as caught:
        plan = llmload.plan({"model": folder}, registry=registry)
    assert "bids [7]" in [note for step in plan.steps for note in step.notes]
    assert str(caught[0].message).startswith("`LoadContext.hook` goes with llmload 0.3.0.")
    assert caught[0].filename == faulty_plugins.__file__


def test_users_are_not_told_of_what_only_authors_can_mend(folder: str) -> None:
    assert issubclass(LeavingWarning, DeprecationWarning)
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("ignore", DeprecationWarning)
        llmload.plan(
            {"model": folder}, registry=llmload.create_registry([AsksAsBefore], environ={})
        )
    assert [one for one in caught if issubclass(one.category, LeavingWarning)] == []


def test_an_installed_plugin_that_uses_what_goes_still_works(
    folder: str, llmload_distributions: FakeDistributions
) -> None:
    llmload_distributions.add("old-dist", {"asks_as_before": "faulty_plugins:AsksAsBefore"})
    with pytest.warns(LeavingWarning):
        plan = llmload.plan({"model": folder}, registry=llmload.create_registry(environ={}))
    assert plan.plugins["asks_as_before"] == "old-dist 1.0"
