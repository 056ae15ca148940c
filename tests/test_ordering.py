"""One order for all plugins, whatever the order they come in."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmload.errors import PluginError
from llmload.hookspecs import STAGES
from llmload.host.ordering import plan_order, stage_of
from llmload.host.registry import create_registry


def plugins(**wishes: dict[str, tuple[str, ...]]) -> dict[str, object]:
    return {name: SimpleNamespace(name=name, **wish) for name, wish in wishes.items()}


def test_without_wishes_plugins_go_by_name() -> None:
    assert plan_order(plugins(b={}, c={}, a={})) == ["a", "b", "c"]


def test_after_and_before_come_first_and_names_break_ties() -> None:
    order = plan_order(plugins(a={"after": ("c",)}, b={}, c={}, d={"before": ("b",)}))
    assert order == ["c", "a", "d", "b"]


def test_plugins_go_by_stage_and_then_by_name() -> None:
    order = plan_order(
        plugins(
            a={"stage": "last"}, b={"stage": "heads"}, d={"stage": "load"}, c={"stage": "heads"}
        )
    )
    assert order == ["d", "b", "c", "a"]


def test_without_a_stage_the_hooks_say_when_a_plugin_acts() -> None:
    def hook() -> None: ...

    order = plan_order(
        plugins(
            a_wrapper={"wrap_adapter": hook},
            a={"stage": "tokens"},
            b={"stage": "quantisation"},
            z={},
            z_loader={"load": hook},
        )
    )
    assert order == ["z_loader", "a", "z", "b", "a_wrapper"]


def test_an_exception_moves_the_plugin_that_makes_it_and_no_other() -> None:
    chain = {name: {"stage": name} for name in ("load", "tokens", "heads", "adapter")}
    early = plan_order(plugins(x={"stage": "adapter", "before": ("load",)}, **chain))
    assert early == ["x", "load", "tokens", "heads", "adapter"]
    late = plan_order(plugins(x={"stage": "load", "after": ("heads",)}, **chain))
    assert late == ["load", "tokens", "heads", "x", "adapter"]


def test_the_built_in_plugins_fall_in_by_their_stages() -> None:
    infos = create_registry(environ={}, autoload=False).plugins
    active = {info.name: info.plugin for info in infos if info.status == "active"}
    assert plan_order(active) == [
        "colossalai",
        "streaming",
        "zero3",
        "tokenizer",
        "embeddings",
        "coati",
        "verify",
        "kbit",
        "dropout",
        "gradient_checkpointing",
        "lora",
        "cast",
        "transformers",
    ]


@given(st.sets(st.sampled_from(sorted(create_registry(environ={}, autoload=False).sections))))
def test_any_choice_of_built_in_plugins_keeps_their_order(names: set[str]) -> None:
    infos = create_registry(environ={}, autoload=False).plugins
    active = {info.name: info.plugin for info in infos if info.status == "active"}
    chosen = {name: active[name] for name in names}
    assert plan_order(chosen) == [name for name in plan_order(active) if name in names]


@pytest.mark.parametrize("stage", STAGES)
def test_a_plugin_written_today_falls_in_without_naming_peers(stage: str) -> None:
    infos = create_registry([SimpleNamespace(name="new", stage=stage)], environ={}).plugins
    order = plan_order({info.name: info.plugin for info in infos if info.status == "active"})
    places = list(STAGES)
    stages = [
        places.index(stage_of(info.plugin)) for n in order for info in infos if info.name == n
    ]
    assert stages == sorted(stages)


def test_a_star_means_after_all_that_do_not_say_so_too() -> None:
    order = plan_order(plugins(a={"after": ("*",)}, b={"after": ("*",)}, c={}, z={}))
    assert order == ["c", "z", "a", "b"]


def test_a_plugin_may_still_ask_to_follow_one_that_wants_to_be_last() -> None:
    assert plan_order(plugins(a={"after": ("*",)}, z={"after": ("*", "a")})) == ["a", "z"]


def test_who_asks_to_follow_a_last_one_comes_after_it_without_being_last_itself() -> None:
    order = plan_order(plugins(a={"after": ("*",)}, b={"after": ("a",)}, c={"after": ("b",)}, d={}))
    assert order == ["d", "a", "b", "c"]


def test_wishes_about_absent_plugins_are_ignored() -> None:
    assert plan_order(plugins(a={"after": ("nobody",), "before": ("no_one",)})) == ["a"]


def test_a_circle_is_refused_and_shown() -> None:
    with pytest.raises(PluginError) as caught:
        plan_order(plugins(a={"after": ("b",)}, b={"after": ("a",)}))
    assert str(caught.value) in {
        f"the plugins cannot be ordered: {circle}, each of which wants to come before the next."
        " Change `after` or `before` of one of them, or leave one out with `-p no:NAME`."
        for circle in ("a -> b -> a", "b -> a -> b")
    }


@given(st.integers(0, 2**32), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))))
def test_the_order_of_installation_never_matters(seed: int, pairs: list[tuple[int, int]]) -> None:
    # Edges from smaller to larger numbers only, so that there is no circle.
    after: dict[str, tuple[str, ...]] = {f"p{i}": () for i in range(10)}
    for one, other in pairs:
        if one != other:
            after[f"p{max(one, other)}"] += (f"p{min(one, other)}",)
    items = list(plugins(**{name: {"after": wish} for name, wish in after.items()}).items())
    expected = plan_order(dict(items))
    random.Random(seed).shuffle(items)
    assert plan_order(dict(items)) == expected
    assert all(
        expected.index(early) < expected.index(late)
        for late, wish in after.items()
        for early in wish
    )
