"""What hooks see of a load: who may set what, and what each run leaves behind."""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llmload
from llmload.testing import context_of, edit_config, save_checkpoint, tiny_llama, tiny_model


@pytest.fixture
def ctx() -> llmload.LoadContext:
    return context_of(tiny_model("llama"))


def load(folder: Path, *plugins: Any, **keys: Any) -> llmload.LoadResult:
    registry = llmload.create_registry(plugins=plugins)
    return llmload.load({"model": str(folder), **keys}, registry=registry)


# --- names ----------------------------------------------------------------------------------------


def test_a_misspelt_attribute_is_an_error(ctx: Any) -> None:
    with pytest.raises(AttributeError, match="splitz"):
        ctx.splitz = True
    with pytest.raises(AttributeError, match="tokeniser"):
        _ = ctx.tokeniser
    for part in (ctx.asked, ctx.found, ctx.records):
        with pytest.raises((AttributeError, TypeError)):
            part.splitz = True


@pytest.mark.parametrize("name", ["spec", "dtype", "model_class", "active", "folder", "sections"])
def test_what_was_asked_is_not_changed(ctx: Any, name: str) -> None:
    with pytest.raises(AttributeError, match=f"'{name}' of a LoadContext is not replaced"):
        setattr(ctx, name, "another")
    with pytest.raises(AttributeError):
        setattr(ctx.asked, name, "another")


@pytest.mark.parametrize(
    "name", ["newly_initialised", "facts", "config", "rehearsing", "claimed", "left_out"]
)
def test_what_has_another_writer_is_not_replaced(ctx: Any, name: str) -> None:
    with pytest.raises(AttributeError) as caught:
        setattr(ctx, name, {})
    assert str(caught.value) == (
        f"{name!r} of a LoadContext is not replaced; help(llmload.LoadContext) says who writes it"
    )


def test_what_many_write_may_be_added_to(ctx: llmload.LoadContext) -> None:
    ctx.newly_initialised |= {"a": "new"}
    ctx.unexpected += ["b"]
    ctx.load_options["device_map"] = "cpu"
    assert (ctx.newly_initialised, ctx.unexpected) == ({"a": "new"}, ["b"])


def test_what_a_plugin_states_for_others_is_set_by_its_name(ctx: llmload.LoadContext) -> None:
    ctx.placed_by, ctx.splits, ctx.reads = "mine", True, "half of it"
    assert (ctx.found.placed_by, ctx.found.splits, ctx.found.reads) == ("mine", True, "half of it")


def test_the_class_shows_its_attributes() -> None:
    assert {"config", "tokenizer", "facts", "spec"} <= set(dir(llmload.LoadContext))
    assert llmload.LoadContext.tokenizer is not None


def test_help_has_the_text_that_stands_with_each_attribute() -> None:
    own = {"asked", "found", "records"}
    for name in set(dir(llmload.LoadContext)) - own - set(dir(object)):
        if not name.startswith("_"):
            assert inspect.getdoc(getattr(llmload.LoadContext, name)), name
    shown = pydoc.render_doc(llmload.LoadContext, renderer=pydoc.plaintext)
    for words in ("The validated spec.", "of a plugin leaves for its own later hooks"):
        assert words in shown


# --- runs -----------------------------------------------------------------------------------------


class Diary:
    """Writes down, at each of its hooks, what is there of what its other hooks left."""

    name = "diary"

    def __init__(self) -> None:
        self.seen: list[tuple[str, list[str]]] = []

    def _write(self, ctx: llmload.LoadContext, hook: str) -> None:
        run = "plan" if ctx.rehearsing else "load"
        self.seen.append((f"{run}: {hook}", sorted(ctx.handed_on.get(self.name, ""))))
        left = [*ctx.facts.get(self.name, ()), *ctx.newly_initialised, *ctx.unexpected]
        assert left == [] or (run, hook) == ("load", "audit")
        assert ctx.load_options.keys() <= {"from the load"}
        assert not ctx.left_out
        assert not ctx.changed_base
        assert not ctx.lines

    @llmload.hookimpl
    def check(self, ctx: llmload.LoadContext) -> Iterator[llmload.Note]:
        self._write(ctx, "check")
        ctx.handed_on[self.name] = "c"
        ctx.new_tokens = {"<new>": 7}
        ctx.record(self.name, {"checked": True})
        return iter(())

    @llmload.hookimpl
    def init_context(self, ctx: llmload.LoadContext) -> None:
        self._write(ctx, "init_context")
        assert ctx.new_tokens == {"<new>": 7}
        ctx.config.use_cache = False

    @llmload.hookimpl
    def post_load(self, ctx: llmload.LoadContext, model: nn.Module) -> nn.Module:
        self._write(ctx, "post_load")
        ctx.handed_on[self.name] += "r" if ctx.rehearsing else "l"
        ctx.record(self.name, {"made": "in the rehearsal" if ctx.rehearsing else "in the load"})
        if ctx.rehearsing:
            ctx.config.remark = "from the rehearsal"
            ctx.newly_initialised["model.norm.weight"] = "from the rehearsal"
            ctx.unexpected.append("from the rehearsal")
            ctx.left_out["from the rehearsal"] = "not there"
            ctx.changed_base["from the rehearsal"] = "not there"
            ctx.load_options["from the rehearsal"] = 1
            ctx.show(self.name, "said", "in the rehearsal")
            ctx.placement, ctx.awaiting = object(), "nobody"
            ctx.keep_alive("from the rehearsal")
        return model

    @llmload.hookimpl
    def audit(self, ctx: llmload.LoadContext, model: nn.Module) -> Iterator[llmload.Problem]:
        self._write(ctx, "audit")
        assert ctx.config.use_cache is False
        assert not hasattr(ctx.config, "remark")
        return iter(())


def test_what_the_rehearsal_records_does_not_reach_the_load(tmp_path: Path) -> None:
    diary = Diary()
    result = load(tiny_llama(tmp_path), diary)
    assert diary.seen == [
        ("plan: check", []),
        ("plan: post_load", ["c"]),
        ("load: init_context", ["c"]),
        ("load: post_load", ["c"]),
        ("load: audit", ["c", "l"]),
    ]
    assert result.plan.facts["diary"] == {"checked": True, "made": "in the rehearsal"}
    assert [line.text for line in result.plan.lines if line.plugin == "diary"] == [
        "in the rehearsal"
    ]
    assert result.report.facts["diary"] == {"made": "in the load"}
    assert result.report.newly_initialised == {}
    assert result.kept_alive == ()


def test_a_field_that_is_configured_holds_for_every_run(tmp_path: Path) -> None:
    ctx = context_of(tiny_model("llama"))
    assert ctx.blank.config.num_hidden_layers == 2
    ctx.configure(num_hidden_layers=1)
    for run in (ctx, ctx.for_run(rehearsing=True), ctx.for_run(rehearsing=False)):
        assert run.config.num_hidden_layers == 1
        assert len(run.blank.model.layers) == 1


# --- what is new ----------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """Another module around a model, under the name ``inner``."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.inner(*args, **options)


class Wrapper:
    """Puts a model into another module, which gives everything in it a longer name."""

    name = "wrapper"

    @llmload.hookimpl
    def post_load(self, ctx: llmload.LoadContext, model: nn.Module) -> nn.Module:
        return Wrapped(model)


class Replacer:
    """Puts another parameter where the head's weight is, and takes the embedding's away."""

    name = "replacer"
    before = ("wrapper",)

    @llmload.hookimpl
    def post_load(self, ctx: llmload.LoadContext, model: Any) -> nn.Module:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.register_buffer("steps", torch.zeros(1, device=model.lm_head.weight.device))
        ctx.newly_initialised["steps"] = "begins at zero"
        return model


@pytest.fixture
def headless(tmp_path: Path) -> Path:
    model = tiny_model("llama")
    folder = save_checkpoint(model.model, tmp_path / "headless")
    edit_config(folder, architectures=["LlamaForCausalLM"])
    return folder


ALLOWED = {"strict": {"allow_missing": ["^lm_head"]}}


def test_what_the_loader_says_is_new_is_found_under_its_name_in_the_finished_model(
    headless: Path,
) -> None:
    result = load(headless, Wrapper(), **ALLOWED)
    assert result.report.newly_initialised == {
        "inner.lm_head.weight": "missing from the checkpoint"
    }
    assert "inner.lm_head.weight" in dict(result.model.named_parameters())


def test_what_took_the_place_of_something_new_is_new(headless: Path) -> None:
    result = load(headless, Replacer(), Wrapper(), **ALLOWED)
    assert result.report.newly_initialised == {
        "inner.lm_head.weight": "missing from the checkpoint",
        "inner.steps": "begins at zero",
    }


class Redraws:
    """Draws the last norm anew, which the checkpoint has."""

    name = "redraws"

    @llmload.hookimpl
    def post_load(self, ctx: llmload.LoadContext, model: Any) -> nn.Module:
        ctx.newly_initialised["model.norm.weight"] = "drawn anew"
        if not ctx.rehearsing:
            nn.init.uniform_(model.model.norm.weight)
        return model


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj"]}])
def test_the_plan_foretells_that_a_value_of_the_checkpoint_is_given_up(
    tmp_path: Path, lora: Any
) -> None:
    result = load(tiny_llama(tmp_path), Redraws(), lora=lora)
    name = "model.norm.weight" if lora is None else "base_model.model.model.norm.weight"
    assert result.plan.new_parameters[name] == "redraws"
    assert result.report.newly_initialised[name] == "drawn anew"
    assert result.plan.new_parameters.keys() == result.report.newly_initialised.keys()


def test_an_adapter_changes_the_names_of_what_is_new(headless: Path) -> None:
    lora = {"r": 2, "target_modules": ["q_proj"]}
    new = load(headless, lora=lora, **ALLOWED).report.newly_initialised
    assert new.pop("base_model.model.lm_head.weight") == "missing from the checkpoint"
    assert set(new.values()) == {"made by PEFT"}


def test_what_is_merged_away_is_not_new(headless: Path) -> None:
    lora = {"r": 2, "target_modules": ["q_proj"]}
    load(headless, lora=lora, **ALLOWED).model.save_pretrained(headless.parent / "adapter")
    merging = {"adapter": str(headless.parent / "adapter"), "merge": True}
    new = load(headless, lora=merging, **ALLOWED).report.newly_initialised
    assert new == {"lm_head.weight": "missing from the checkpoint"}
