"""The host: discovery, selection, refusal by name, and every pluggy trap closed."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llmload
from llmload import Section, create_registry, hookimpl
from llmload.builtin.dropout.plugin import DropoutPlugin
from llmload.errors import PluginError, RequestError
from llmload.host.contract import faults, manager_of
from llmload.host.discovery import from_object
from llmload.host.registry import PluginInfo, Registry
from llmload.spec.loadspec import LoadSpec
from llmload.testing import FakeDistributions, fake_distributions

GOOD = """
import llmload

class Plugin:
    name = {name!r}

    class Section(llmload.Section):
        size: int = 1

    @llmload.hookimpl
    def post_load(self, ctx, model):
        return model
"""


def add_good(llmload_distributions: FakeDistributions, name: str, distribution: str = "") -> None:
    module = f"module_{distribution.replace('-', '_') or name}"
    llmload_distributions.add(
        distribution or f"dist-{name}", {name: f"{module}:Plugin"}, module, GOOD.format(name=name)
    )


def info(registry: Registry, name: str, *, builtin: bool = False) -> PluginInfo:
    found, *others = (i for i in registry.plugins if i.name == name and i.builtin is builtin)
    assert not others
    return found


def reason_of(plugin: object) -> str:
    """Why a plugin given as an object is refused."""
    with pytest.raises(PluginError) as caught:
        create_registry([plugin], environ={})
    return str(caught.value)


# --- discovery ----------------------------------------------------------------------------------


def test_built_in_plugins_come_through_the_same_entry_points_as_others(
    llmload_distributions: FakeDistributions,
) -> None:
    add_good(llmload_distributions, "extra")
    registry = create_registry(environ={})
    status = {info.name: (info.builtin, info.status) for info in registry.plugins}
    assert status["transformers"] == (True, "active")
    assert status["extra"] == (False, "active")
    assert info(registry, "extra").distribution == "dist-extra 1.0"


def test_two_registries_share_no_plugin_object(llmload_distributions: FakeDistributions) -> None:
    add_good(llmload_distributions, "extra")
    one, other = create_registry(environ={}), create_registry(environ={})
    assert info(one, "extra").plugin is not info(other, "extra").plugin


def test_the_plan_order_is_the_same_whatever_the_order_of_installation(
    tmp_path: Path,
) -> None:
    orders = []
    for turn, names in enumerate((("one", "two", "three"), ("three", "one", "two"))):
        root = tmp_path / str(turn)
        root.mkdir()
        with fake_distributions(root) as fakes:
            for name in names:
                add_good(fakes, name)
            registry = create_registry(environ={})
            spec = registry.validate({"model": "m", "one": {}, "two": {}, "three": {}})
            orders.append(registry.activate(spec).names)
    assert orders[0] == orders[1]
    assert [name for name in orders[0] if name in ("one", "two", "three")] == [
        "one",
        "three",
        "two",
    ]


# --- selection ----------------------------------------------------------------------------------


def test_of_twenty_distributions_only_the_selected_one_is_imported(
    llmload_distributions: FakeDistributions,
) -> None:
    for number in range(20):
        add_good(llmload_distributions, f"plugin{number}")
    registry = create_registry(select=["plugin7"], autoload=False, environ={})
    imported = [n for n in range(20) if f"module_plugin{n}" in sys.modules]
    assert imported == [7]
    assert info(registry, "plugin7").status == "active"
    assert info(registry, "plugin8").status == "not selected"


def test_a_blocked_plugin_is_not_imported_even_when_selected(
    llmload_distributions: FakeDistributions,
) -> None:
    add_good(llmload_distributions, "extra")
    registry = create_registry(select=["extra"], block=["extra"], environ={})
    assert info(registry, "extra").status == "blocked"
    assert "module_extra" not in sys.modules


def test_a_blocked_name_cannot_be_taken_by_another_object() -> None:
    plugin = SimpleNamespace(name="dropout")
    registry = create_registry([plugin], block=["dropout"], environ={})
    assert {i.status for i in registry.plugins if i.name == "dropout"} == {"blocked"}


@pytest.mark.parametrize(
    ("select", "environ", "expected"),
    [
        ([], {}, "active"),
        (["no:extra"], {}, "blocked"),
        ([], {"LLMLOAD_PLUGINS": "no:extra"}, "blocked"),
        ([], {"LLMLOAD_DISABLE_PLUGIN_AUTOLOAD": "1"}, "not selected"),
        (["extra"], {"LLMLOAD_DISABLE_PLUGIN_AUTOLOAD": "1"}, "active"),
        (
            [],
            {"LLMLOAD_DISABLE_PLUGIN_AUTOLOAD": "1", "LLMLOAD_PLUGINS": "other, extra"},
            "active",
        ),
    ],
)
def test_plugins_are_selected_by_argument_and_environment(
    llmload_distributions: FakeDistributions,
    select: list[str],
    environ: dict[str, str],
    expected: str,
) -> None:
    add_good(llmload_distributions, "extra")
    add_good(llmload_distributions, "other")
    assert info(create_registry(select=select, environ=environ), "extra").status == expected


def test_built_in_plugins_stay_without_autoload() -> None:
    registry = create_registry(environ={"LLMLOAD_DISABLE_PLUGIN_AUTOLOAD": "1"})
    assert {i.status for i in registry.plugins if i.builtin} == {"active"}


def test_a_plugin_can_be_selected_as_module_and_attribute(
    llmload_distributions: FakeDistributions,
) -> None:
    (llmload_distributions.root / "loose.py").write_text(GOOD.format(name="loose"))
    registry = create_registry(select=["loose:Plugin"], environ={})
    assert info(registry, "loose").status == "active"


def test_a_module_that_is_not_there_is_refused() -> None:
    with pytest.raises(PluginError) as caught:
        create_registry(select=["nowhere_at_all:Plugin"], environ={})
    assert str(caught.value) == (
        "plugin 'nowhere_at_all:Plugin' was selected, but cannot be imported: No module named"
        " 'nowhere_at_all'. Write it as `module:attribute`, and check that the module is on the"
        " path."
    )


def test_a_selected_name_that_nobody_provides_is_refused_with_the_nearest() -> None:
    with pytest.raises(PluginError) as caught:
        create_registry(select=["dropuot"], environ={})
    assert str(caught.value) == (
        "plugin 'dropuot' was selected, but no installed distribution provides it."
        " Did you mean 'dropout'?"
    )


def test_a_section_of_a_blocked_plugin_is_refused() -> None:
    registry = create_registry(block=["dropout"], environ={})
    with pytest.raises(PluginError) as caught:
        registry.validate({"model": "m", "dropout": {}})
    distribution = next(i for i in registry.plugins if i.name == "dropout").distribution
    assert str(caught.value) == (
        f"dropout: the spec has the section 'dropout', but the plugin 'dropout' ({distribution})"
        " is blocked. Remove the section or the block `no:dropout`."
    )


def test_a_section_of_a_plugin_that_is_not_selected_is_refused(
    llmload_distributions: FakeDistributions,
) -> None:
    add_good(llmload_distributions, "extra")
    with pytest.raises(PluginError) as caught:
        create_registry(autoload=False, environ={}).validate({"model": "m", "extra": {}})
    assert str(caught.value) == (
        "extra: the spec has the section 'extra', but the plugin 'extra' (dist-extra 1.0) is not"
        " selected. Remove the section, or select the plugin with `-p extra`."
    )


# --- the contract -------------------------------------------------------------------------------


def test_built_in_plugins_keep_the_contract() -> None:
    infos = [info for info in create_registry(environ={}).plugins if info.builtin]
    assert {"streaming", "zero3", "lora", "kbit"} <= {info.name for info in infos}
    assert [(info.name, info.reason) for info in infos if info.status != "active"] == []
    manager = manager_of(info.plugin for info in infos)
    found = {info.name: list(faults(info, manager)) for info in infos}  # no registry looks for them
    assert {name for name, texts in found.items() if texts} == set()


def test_a_distribution_that_calls_itself_llmload_has_no_built_in_plugins(
    llmload_distributions: FakeDistributions,
) -> None:
    source = GOOD.format(name="odd").replace("post_load", "post_laod")
    llmload_distributions.add("llmload", {"odd": "odd_module:Plugin"}, "odd_module", source)
    registry = create_registry(environ={})
    found = info(registry, "odd")
    assert not found.builtin
    assert info(registry, "lora", builtin=True)  # which it does not hide
    assert (found.status, found.reason) == (
        "broken",
        "`post_laod` is not a hook. Did you mean 'post_load'?",
    )


def test_a_hook_of_a_plugin_that_is_left_out_breaks_nobody(
    llmload_distributions: FakeDistributions,
) -> None:
    registry = create_registry(block=["lora"], environ={})
    assert [i.name for i in registry.plugins if i.status == "broken"] == []
    llmload_distributions.add(
        "bad-dist",
        {"odd": "odd_module:Plugin"},
        "odd_module",
        GOOD.format(name="odd").replace("post_load", "post_laod"),
    )
    registry = create_registry(block=["lora"], environ={})
    assert info(registry, "odd").reason == "`post_laod` is not a hook. Did you mean 'post_load'?"


def test_a_section_is_built_only_where_it_is_looked_at() -> None:
    class Mine:
        name = "mine"

        class Section(llmload.Section):
            size: int = 1

    class Other:
        name = "other"

        class Section(llmload.Section):
            size: int = 1

    registry = Registry([from_object(Mine), from_object(Other)])
    registry.validate({"model": "m", "mine": {}})
    assert Mine.Section.__pydantic_complete__
    assert not Other.Section.__pydantic_complete__
    assert [found.status for found in registry.plugins] == ["active", "active"]
    assert Other.Section.__pydantic_complete__


def test_hooks_of_other_plugins_are_listed_after_those_of_the_manual() -> None:
    registry = create_registry(environ={})
    assert info(registry, "coati", builtin=True).hooks == ("check", "check_lora", "lora_layer")
    assert info(registry, "lora", builtin=True).hooks == ("check", "cost", "audit", "wrap_adapter")


# --- broken plugins -----------------------------------------------------------------------------

BROKEN = {
    "import error": ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
    "syntax error": ("def broken(:", "SyntaxError: invalid syntax"),
    "exit at import": ("raise SystemExit(3)", "SystemExit: 3"),
    "no attribute": ("Other = 1", "AttributeError: module 'broken_module' has no attribute"),
    "misspelt hook": (
        GOOD.format(name="broken").replace("post_load", "post_laod"),
        "`post_laod` is not a hook. Did you mean 'post_load'?",
    ),
    "wrong argument": (
        GOOD.format(name="broken").replace("ctx, model", "context, model"),
        "`post_load` takes the argument 'context', the hook offers ctx, model",
    ),
    "defaulted argument": (
        GOOD.format(name="broken").replace("ctx, model", "ctx, model=None"),
        "`post_load` gives the argument 'model' a default, which would hide it",
    ),
    "pluggy order": (
        GOOD.format(name="broken").replace("hookimpl", "hookimpl(tryfirst=True)"),
        "`post_load` uses tryfirst or trylast: order is set with `after` and `before`",
    ),
    "forgotten marker": (
        GOOD.format(name="broken").replace("    @llmload.hookimpl\n", ""),
        "`post_load` is not marked with @llmload.hookimpl",
    ),
    "other name": (
        GOOD.format(name="other"),
        "its entry point is called 'broken', but its `name` is 'other'",
    ),
    "loose section": (
        GOOD.format(name="broken").replace("size: int = 1", "model_config = {'extra': 'allow'}"),
        'its `Section` does not forbid unknown keys: set `extra="forbid"`',
    ),
    "text for a tuple": (
        GOOD.format(name="broken") + "    after = 'lora'\n",
        "its `after` is the text 'lora': write `after = ('lora',)`",
    ),
    "order of no names": (
        GOOD.format(name="broken") + "    before = 3\n",
        "its `before` is 3, and must be a tuple of texts",
    ),
    "unknown stage": (
        GOOD.format(name="broken") + "    stage = 'headz'\n",
        "its `stage` 'headz' is not known. Did you mean 'heads'?",
    ),
    "stage of no text": (
        GOOD.format(name="broken") + "    stage = 3\n",
        "its `stage` 3 is not known. Known are: load, parallel, tokens, model, quantisation, heads,"
        " training, adapter, dtype, last.",
    ),
    "unknown ability": (
        GOOD.format(name="broken") + "    provides = ('quantization',)\n",
        "its `provides` 'quantization' is not known. Did you mean 'quantisation'? One of its own"
        " begins with 'broken.'",
    ),
    "requirement of nothing": (
        GOOD.format(name="broken") + "    requires = ('peft >= newest',)\n",
        "its `requires` has 'peft >= newest', which names no distribution",
    ),
    "conflict of no kind": (
        GOOD.format(name="broken") + "    conflicts = ('lora',)\n",
        "its `conflicts` is ('lora',), and must be a tuple of llmload.Conflict",
    ),
    "conflict with nothing": (
        GOOD.format(name="broken")
        + "    conflicts = (llmload.Conflict(reason='because', fix='Do not.'),)\n",
        "one of its `conflicts` must have a `key` or an `ability`, and not both",
    ),
    "conflict with an unknown ability": (
        GOOD.format(name="broken")
        + "    conflicts = (llmload.Conflict(ability='quantization', reason='so', fix='Not.'),)\n",
        "its `conflicts` 'quantization' is not known. Did you mean 'quantisation'?",
    ),
    "hooks of no specs": (
        GOOD.format(name="broken") + "    class Hooks:\n        pass\n",
        "its `Hooks` declares no hook: mark each with @llmload.hookspec",
    ),
    "always active and incomplete": (
        GOOD.format(name="broken").replace("size: int = 1", "size: int")
        + "    always_active = True\n",
        "it is `always_active`, and its `Section` cannot be made without 'size': give each a",
    ),
    "raises when looked at": (
        GOOD.format(name="broken")
        + "    @property\n    def after(self):\n        raise OSError('no disk')\n",
        "looking at it raised OSError: no disk",
    ),
    "section of no type": (
        GOOD.format(name="broken").replace("size: int = 1", "size: memoryview"),
        "its `Section` cannot be built: Unable to generate pydantic-core schema for"
        " <class 'memoryview'>",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plugin_is_reported_and_fails_only_the_load_that_names_it(
    llmload_distributions: FakeDistributions, fault: str
) -> None:
    source, reason = BROKEN[fault]
    llmload_distributions.add(
        "bad-dist", {"broken": "broken_module:Plugin"}, "broken_module", source, "2.1"
    )
    add_good(llmload_distributions, "extra")
    registry = create_registry(environ={})

    assert info(registry, "broken").status == "broken"
    assert reason in info(registry, "broken").reason
    assert info(registry, "extra").status == "active"

    spec = registry.validate({"model": "m", "extra": {}})
    assert "broken" not in registry.activate(spec).names

    with pytest.raises(PluginError) as caught:
        registry.validate({"model": "m", "broken": {}})
    assert str(caught.value) == (
        "broken: plugin 'broken' (bad-dist 2.1) is broken:"
        f" {info(registry, 'broken').reason}."
        " Mend or uninstall it, or leave it out with `-p no:broken`."
    )


def test_a_broken_plugin_that_is_selected_by_name_fails_every_load(
    llmload_distributions: FakeDistributions,
) -> None:
    llmload_distributions.add(
        "bad-dist", {"broken": "broken_module:Plugin"}, "broken_module", "1/0"
    )
    registry = create_registry(select=["broken"], environ={})
    with pytest.raises(PluginError, match="is broken: ZeroDivisionError: division by zero"):
        registry.activate(LoadSpec(model="m"))


def test_one_hook_of_a_broken_plugin_never_runs(llmload_distributions: FakeDistributions) -> None:
    # pluggy 1.6 keeps the hooks it had seen when a registration fails half-way.
    source = (
        GOOD.format(name="broken") + "\n    @llmload.hookimpl\n    def zzz(self):\n        pass\n"
    )
    llmload_distributions.add(
        "bad-dist", {"broken": "broken_module:Plugin"}, "broken_module", source
    )
    host = create_registry(environ={}).activate(LoadSpec(model="m"))
    assert "broken" not in host.implementing("post_load")


def test_two_distributions_with_one_name_break_both(
    llmload_distributions: FakeDistributions,
) -> None:
    add_good(llmload_distributions, "extra", "first-dist")
    add_good(llmload_distributions, "extra", "second-dist")
    registry = create_registry(environ={})
    both = [i for i in registry.plugins if i.name == "extra"]
    assert [i.status for i in both] == ["broken", "broken"]
    assert {i.reason for i in both} == {
        "the name 'extra' is provided by first-dist 1.0 and second-dist 1.0"
    }


def test_a_plugin_that_shadows_a_built_in_fails_the_load_that_names_it_and_no_other(
    llmload_distributions: FakeDistributions,
) -> None:
    add_good(llmload_distributions, "dropout", "evil-dist")
    registry = create_registry(environ={})
    registry.activate(LoadSpec(model="m"))
    with pytest.raises(PluginError, match=r"the name 'dropout' is provided by evil-dist 1\.0 and"):
        registry.validate({"model": "m", "dropout": {}})


def test_a_plugin_may_not_take_a_core_key(llmload_distributions: FakeDistributions) -> None:
    add_good(llmload_distributions, "dtype")
    assert info(create_registry(environ={}), "dtype").reason == (
        "the name 'dtype' is a core key of the spec"
    )


# --- plugins given as objects -------------------------------------------------------------------


def test_an_object_without_a_name_is_no_plugin() -> None:
    assert reason_of(SimpleNamespace()) == (
        "an object of type SimpleNamespace is not a plugin: it has no `name`. Give it a class"
        " attribute `name`, its key in the spec."
    )


def test_an_object_that_breaks_the_contract_is_refused_at_once() -> None:
    class Plugin:
        name = "mine"

        @hookimpl
        def laod(self, ctx: Any) -> None: ...

    assert reason_of(Plugin()) == (
        "plugin 'mine' breaks the hook contract: `laod` is not a hook. Did you mean 'load'?"
    )


def test_an_error_of_a_hook_bears_the_plugins_name_in_words_and_in_data() -> None:
    class Plugin:
        name = "mine"

        @hookimpl
        def check(self, ctx: Any) -> None:
            raise RequestError("it cannot be", fix="Ask for less.")

    host = create_registry([Plugin()], environ={}).activate(LoadSpec(model="m"))
    with pytest.raises(RequestError) as caught:
        host.call("mine", "check", ctx=None)
    assert str(caught.value) == "plugin 'mine': it cannot be. Ask for less."
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.problems, str(again)) == (caught.value.problems, str(caught.value))


def test_a_section_that_is_no_model_is_refused() -> None:
    assert reason_of(SimpleNamespace(name="mine", Section=dict)) == (
        "plugin 'mine' breaks the hook contract: its `Section` is not a pydantic model"
    )


def test_an_object_cannot_take_the_name_of_an_installed_plugin() -> None:
    assert "the name 'dropout' is provided by given as an object and" in reason_of(
        SimpleNamespace(name="dropout")
    )


def test_an_installed_plugin_can_be_given_as_an_object_too(
    llmload_distributions: FakeDistributions,
) -> None:
    add_good(llmload_distributions, "extra")
    module = importlib.import_module("module_extra")
    for given in (module.Plugin, module.Plugin()):
        found = [i for i in create_registry([given], environ={}).plugins if i.name == "extra"]
        assert [(i.status, i.distribution) for i in found] == [("active", "dist-extra 1.0")]
        assert found[0].plugin is given or type(found[0].plugin) is given
    selected = create_registry(select=["module_extra:Plugin"], autoload=False, environ={})
    assert info(selected, "extra").status == "active"


def test_a_built_in_plugin_can_be_given_as_an_object_too() -> None:
    registry = create_registry([DropoutPlugin()], environ={})
    assert [(i.status, i.builtin) for i in registry.plugins if i.name == "dropout"] == [
        ("active", True)
    ]


def test_a_class_that_wants_arguments_is_refused() -> None:
    class Plugin:
        name = "mine"

        def __init__(self, size: int) -> None: ...

    reason = reason_of(Plugin)
    assert "Plugin' cannot be made: TypeError: " in reason
    assert reason.endswith("A plugin class takes no arguments; give an object instead.")


FAILING_MODULES = {
    "raises": ("1 / 0", "ZeroDivisionError: division by zero"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "wants an argument": (
        "class Plugin:\n    def __init__(self, a): ...",
        "cannot be made: TypeError",
    ),
    "has no name": ("class Plugin: ...", "is not a plugin: it has no `name`"),
    "lacks the attribute": ("Other = 1", "module 'failing' has no attribute 'Plugin'"),
}


@pytest.mark.parametrize("fault", FAILING_MODULES)
def test_a_selected_module_that_fails_is_refused_and_nothing_else_happens(
    llmload_distributions: FakeDistributions, fault: str
) -> None:
    source, reason = FAILING_MODULES[fault]
    (llmload_distributions.root / "failing.py").write_text(source)
    with pytest.raises(PluginError) as caught:
        create_registry(environ={"LLMLOAD_PLUGINS": "failing:Plugin"})
    assert reason in str(caught.value)


def test_a_selected_path_without_a_module_is_refused() -> None:
    with pytest.raises(PluginError, match="plugin ':Plugin' was selected, but cannot be imported"):
        create_registry(select=[":Plugin"], environ={})


# --- calling ------------------------------------------------------------------------------------


class Recorder:
    """A plugin that writes down when its hooks are called."""

    def __init__(self, name: str, calls: list[str], **wishes: Any) -> None:
        self.name = name
        self.calls = calls
        vars(self).update(wishes)

    @hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        self.calls.append(self.name)
        return f"{model}>{self.name}"


def test_hooks_are_called_in_plan_order_not_last_registered_first() -> None:
    calls: list[str] = []
    plugins = [Recorder("c", calls), Recorder("a", calls), Recorder("b", calls, before=("a",))]
    host = create_registry(plugins, autoload=False, environ={}).activate(LoadSpec(model="m"))
    order = [name for name in host.implementing("post_load") if name in "abc"]
    for name in order:
        host.call(name, "post_load", ctx=None, model="m")
    assert calls == order == ["b", "a", "c"]


def test_calling_one_plugin_calls_no_other_and_keeps_wrappers() -> None:
    class Wrapper:
        name = "wrapper"

        @hookimpl(wrapper=True)
        def post_load(self, ctx: Any, model: Any) -> Any:
            results = yield
            return [f"<{result}>" for result in results]

    calls: list[str] = []
    plugins = [Recorder("a", calls), Recorder("b", calls), Wrapper()]
    host = create_registry(plugins, environ={}).activate(LoadSpec(model="m"))
    assert "wrapper" not in host.implementing("post_load")
    assert host.call("a", "post_load", ctx=None, model="m") == "<m>a>"
    assert calls == ["a"]


def test_plugins_that_cannot_be_hashed_share_a_hook() -> None:
    class Unhashable(Recorder):
        __hash__ = None  # type: ignore[assignment]

    calls: list[str] = []
    plugins = [Unhashable("a", calls), Unhashable("b", calls), Recorder("c", calls)]
    host = create_registry(plugins, autoload=False, environ={}).activate(LoadSpec(model="m"))
    assert host.call("b", "post_load", ctx=None, model="m") == "m>b"
    for name in "abc":
        assert host.call(name, "post_load", ctx=None, model="m") == f"m>{name}"
    assert calls == ["b", *"abc"]


def test_a_plugin_can_declare_a_hook_that_others_implement() -> None:
    class Hooks:
        @staticmethod
        @llmload.hookspec(firstresult=True)
        def favourite_colour(of: str) -> str: ...

    class Implementer:
        name = "implementer"

        @hookimpl
        def favourite_colour(self, of: str) -> str:
            return f"{of}: green"

    declarer = SimpleNamespace(name="declarer", Hooks=Hooks)
    host = create_registry([Implementer(), declarer], environ={}).activate(LoadSpec(model="m"))
    assert host.hook.favourite_colour(of="tree") == "tree: green"


def test_a_plugin_with_a_section_takes_part_where_the_spec_has_its_key() -> None:
    class Sized(Recorder):
        class Section(Section):
            size: int = 1

    registry = create_registry(
        [Sized("sometimes", []), Sized("always", [], always_active=True)], environ={}
    )
    assert "sometimes" not in registry.activate(LoadSpec(model="m")).names
    spec = registry.validate({"model": "m", "sometimes": {"size": 2}})
    host = registry.activate(spec)
    assert {"always", "sometimes"} <= set(host.names)
    assert host.sections["sometimes"] == Sized.Section(size=2)
    assert host.sections["always"] == Sized.Section()


def test_discovery_imports_no_machine_learning_library() -> None:
    code = (
        "import sys, llmload\n"
        "llmload.create_registry(environ={})\n"
        "heavy = {'torch', 'transformers', 'peft', 'deepspeed', 'bitsandbytes', 'accelerate'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_section_with_null_names_no_plugin() -> None:
    registry = create_registry(block=["lora"], environ={})
    assert registry.validate({"model": "gpt2", "lora": None}).sections == {}
    with pytest.raises(PluginError, match="the plugin 'lora' "):
        registry.validate({"model": "gpt2", "lora": {}})
