"""One load from spec to result: what it gives and refuses, and that it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmload
from llmload import Decline, hookimpl
from llmload.errors import AuditError, CheckpointError, LoadFailedError, PlanError, PluginError
from llmload.hf import installed_transformers
from llmload.host.registry import create_registry
from llmload.testing import edit_config, snapshot, tiny_checkpoint, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("pipeline"))


class Named:
    """A plugin made of single functions, for one test."""

    def __init__(self, name: str, **attributes: Any) -> None:
        self.name = name
        vars(self).update(attributes)


def plugin(name: str, hook: str, function: Any, **attributes: Any) -> object:
    """Make a plugin object with one hook, whose arguments are those of ``function``."""
    return Named(name, **{hook: hookimpl(function)}, **attributes)


def load_with(folder: Path, *plugins: object, **keys: Any) -> llmload.LoadResult:
    registry = create_registry(plugins, environ={})
    return llmload.load({"model": str(folder), **keys}, registry=registry)


# --- what a load gives ------------------------------------------------------------------------


def test_a_loaded_model_is_what_from_pretrained_gives(folder: Path) -> None:
    result = load_with(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    assert type(result.model) is type(reference)
    assert not result.model.training
    ours, theirs = result.model.state_dict(), reference.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_declared_dtype_is_cast_to(folder: Path) -> None:
    result = load_with(folder, dtype="bfloat16")
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert installed_transformers().config_dtype(result.model.config) == torch.bfloat16


def test_random_weights_read_no_weight_and_are_all_listed_as_new(folder: Path) -> None:
    result = load_with(folder, weights="random")
    assert set(result.report.newly_initialised) == {n for n, _ in result.model.named_parameters()}
    assert result.plan.checkpoint_tensors == 0


def test_random_weights_are_those_of_from_config_under_the_same_seed(folder: Path) -> None:
    torch.manual_seed(3)
    ours = load_with(folder, weights="random").model.state_dict()
    torch.manual_seed(3)
    theirs = AutoModelForCausalLM.from_config(load_with(folder).model.config).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_report_names_phases_versions_plugins_and_sizes(folder: Path) -> None:
    result = load_with(folder, dropout={})
    report = result.report
    assert report.phases[0].name == "plan"
    assert {"init_context", "load", "post_load", "audit"} <= {p.name for p in report.phases}
    assert all(phase.seconds >= 0 and phase.peak_rss_mib > 0 for phase in report.phases)
    assert {"python", "torch", "transformers"} <= set(report.versions)
    assert list(report.plugins) == list(result.plan.plugins)
    parameters = list(result.model.parameters())
    assert report.parameters == sum(p.numel() for p in parameters) == result.plan.parameters
    assert report.parameter_bytes == sum(p.nbytes for p in parameters)
    assert report.compared == len(parameters)
    assert llmload.Report.model_validate_json(report.model_dump_json()) == report


def test_the_trainable_line_is_the_one_that_peft_prints(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = load_with(folder, lora={"r": 2, "target_modules": "all-linear"})
    result.model.print_trainable_parameters()
    assert result.report.trainable_line() == capsys.readouterr().out.strip()


# --- the plan -----------------------------------------------------------------------------------


def test_the_plan_reads_no_weight(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    monkeypatch.setattr("mmap.mmap", refuse)
    monkeypatch.setattr("llmload.checkpoint.libc.mapped", refuse)
    plan = llmload.plan({"model": str(folder), "lora": {"r": 2}}, registry=create_registry())
    assert not plan.errors


def test_the_plan_names_steps_loaders_and_parameters(folder: Path) -> None:
    plan = llmload.plan(
        {"model": str(folder), "dropout": {}, "lora": {"r": 2, "target_modules": ["q_proj"]}},
        registry=create_registry([plugin("shy", "check", lambda ctx: [Decline("not today")])]),
    )
    steps = [(step.hook, step.plugin) for step in plan.steps]
    assert steps.index(("load", plan.loader)) < steps.index(("post_load", "dropout"))
    assert steps[-1] == ("wrap_adapter", "lora")
    assert plan.declined["shy"] == "not today"
    assert plan.trainable_parameters == list(plan.new_parameters)
    assert set(plan.new_parameters.values()) == {"lora"}
    assert llmload.Plan.model_validate_json(plan.model_dump_json()) == plan


def test_planning_leaves_the_random_stream_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    llmload.plan({"model": str(folder), "lora": {"r": 2}, "embeddings": {"pad_to_multiple_of": 8}})
    assert torch.equal(torch.get_rng_state(), before)


def test_a_hook_that_cannot_be_rehearsed_is_a_warning_and_promises_nothing(folder: Path) -> None:
    def needs_values(ctx: Any, model: Any) -> Any:
        assert float(next(model.parameters()).sum()) is not None
        return model

    result = load_with(folder, plugin("peeks", "post_load", needs_values))
    assert result.plan.trainable_parameters is None
    (warning,) = result.plan.warnings
    assert "could not be rehearsed on the meta device" in warning.message
    assert "the trainable set was not promised by the plan" in result.report.audit


# --- contracts of the hooks ---------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["load", "post_load", "wrap_adapter", "distribute"])
def test_a_forgotten_return_is_an_error_that_names_the_plugin(folder: Path, hook: str) -> None:
    def forgets(ctx: Any, model: Any = None) -> None: ...

    if hook == "load":
        faulty = plugin("forgetful", hook, lambda ctx: None)
        allowed = "a module or llmload.Decline(reason)"
    else:
        faulty = plugin("forgetful", hook, lambda ctx, model: None)
        changes = hook in ("post_load", "distribute")
        allowed = "the module" if changes else "a module or llmload.Decline(reason)"
    with pytest.raises((PluginError, llmload.PlanError)) as caught:
        load_with(folder, faulty)
    assert str(caught.value).removeprefix("plugin 'forgetful': ") == (
        f"plugin 'forgetful' (given as an object) returned nothing from {hook}, which must return"
        f" {allowed}. A forgotten `return model` is the usual cause."
    )


def test_what_is_known_of_parameters_follows_those_that_take_their_place(folder: Path) -> None:
    def replace(ctx: Any, model: Any) -> Any:
        for module in model.modules():
            for name, old in list(module.named_parameters(recurse=False)):
                new = torch.nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
                module.register_parameter(name, new)
        return model

    plain = load_with(folder, lora={})
    result = load_with(folder, plugin("copies", "distribute", replace), lora={})
    assert result.report.newly_initialised == plain.report.newly_initialised
    assert result.report.compared == plain.report.compared > 0


def test_a_plugin_that_renames_parameters_in_distribute_is_named(folder: Path) -> None:
    def rename(ctx: Any, model: Any) -> Any:
        return torch.nn.Sequential(model)

    model = load_with(folder).model
    others = 2 * len([*model.named_parameters(), *model.named_buffers()]) - 3
    with pytest.raises(PluginError) as caught:
        load_with(folder, plugin("renames", "distribute", rename))
    assert str(caught.value) == (
        "plugin 'renames' (given as an object) changed names or shapes of '0.lm_head.weight',"
        " '0.model.embed_tokens.weight', '0.model.layers.0.input_layernorm.weight' and"
        f" {others} more in distribute."
        " What changes them belongs into post_load, which is rehearsed for the plan."
    )


def test_a_loader_that_declines_while_loading_hands_over_to_the_next(folder: Path) -> None:
    result = load_with(folder, plugin("shy", "load", lambda ctx: Decline("too big for me")))
    assert result.report.declined["shy"] == "too big for me"
    assert result.report.loader in ("streaming", "transformers")


@pytest.mark.refused_late
def test_no_loader_at_all_is_refused_with_all_reasons(folder: Path) -> None:
    registry = create_registry(
        [plugin("shy", "load", lambda ctx: Decline("not today"))],
        block=["transformers", "streaming"],
        environ={},
    )
    with pytest.raises(CheckpointError) as caught:
        llmload.load({"model": str(folder)}, registry=registry)
    assert str(caught.value) == (
        "no loader takes this model (shy: not today). Select the plugin `transformers`, which"
        " takes every model."
    )


def test_what_a_plugin_did_not_mean_to_raise_names_plugin_and_hook(folder: Path) -> None:
    def fails(ctx: Any) -> Any:
        raise ZeroDivisionError("oh")

    with pytest.raises(LoadFailedError) as caught:
        load_with(folder, plugin("faulty", "init_context", fails))
    assert str(caught.value) == (
        "plugin 'faulty' (given as an object) failed in init_context: ZeroDivisionError: oh"
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_contexts_are_entered_in_order_and_left_in_reverse_after_wrap_adapter(folder: Path) -> None:
    log: list[str] = []

    def context(name: str) -> Any:
        @contextmanager
        def manager() -> Iterator[None]:
            log.append(f"enter {name}")
            yield
            log.append(f"leave {name}")

        return plugin(name, "init_context", lambda ctx: manager())

    def wrap(ctx: Any, model: Any) -> Any:
        log.append("rehearse" if ctx.rehearsing else "wrap")
        return model

    load_with(folder, context("a"), context("b"), plugin("c", "wrap_adapter", wrap))
    assert log == ["rehearse", "enter a", "enter b", "wrap", "leave b", "leave a"]


@pytest.mark.parametrize("failing", ["post_load", "audit", None])
def test_contexts_until_the_end_outlast_the_audit_and_see_every_error(
    folder: Path, failing: str | None
) -> None:
    seen: list[str] = []

    @contextmanager
    def outlasting() -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            seen.append(type(error).__name__)
            raise
        seen.append("end")

    def init_context(ctx: Any) -> None:
        ctx.until_end.enter_context(outlasting())

    def post_load(ctx: Any, model: Any) -> Any:
        if failing == "post_load" and not ctx.rehearsing:
            raise RuntimeError("too late")
        return model

    def audit(ctx: Any, model: Any) -> None:
        seen.append("audit")
        if failing == "audit":
            raise RuntimeError("too late")

    hooks = {"post_load": hookimpl(post_load), "audit": hookimpl(audit)}
    watcher = plugin("watcher", "init_context", init_context, **hooks)
    if failing is None:
        load_with(folder, watcher)
        assert seen == ["audit", "end"]
        return
    with pytest.raises(LoadFailedError, match="too late"):
        load_with(folder, watcher)
    assert seen == (["audit"] if failing == "audit" else []) + ["LoadFailedError"]


def test_what_a_plugin_keeps_alive_lives_as_long_as_the_result(folder: Path) -> None:
    token = object()
    result = load_with(folder, plugin("k", "init_context", lambda ctx: ctx.keep_alive(token)))
    assert result.kept_alive == (token,)


def test_a_change_of_the_config_reaches_the_model_and_no_other_load(folder: Path) -> None:
    def change(ctx: Any) -> None:
        ctx.config.rms_norm_eps = 0.5

    assert load_with(folder, plugin("c", "init_context", change)).model.config.rms_norm_eps == 0.5
    assert load_with(folder).model.config.rms_norm_eps != 0.5


# --- the audit ----------------------------------------------------------------------------------


def test_frequencies_that_old_checkpoints_store_in_half_precision_are_computed(
    tmp_path: Path,
) -> None:
    """As from_pretrained does: they are no weights, and nothing is read for them."""
    folder = tiny_llama(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.rotary_emb.inv_freq"] = torch.tensor([1.0, 0.013]).half()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    result = llmload.load({"model": str(folder)})
    frequencies = result.model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert not torch.equal(frequencies, weights["model.rotary_emb.inv_freq"].float())


@pytest.mark.refused_late  # what a loader did, only the model tells
def test_a_loader_that_leaves_memory_uninitialised_is_caught(folder: Path) -> None:
    def empty(ctx: Any) -> Any:
        return ctx.model_class(ctx.config)

    with pytest.raises(AuditError) as caught:
        load_with(folder, plugin("empty", "load", empty))
    assert str(caught.value).endswith(
        "more differ from the checkpoint after loading. Try another loader with `-p no:NAME`, and"
        " report this."
    )


@pytest.mark.refused_late  # in the rehearsal all is on the meta device
def test_a_meta_tensor_is_caught(folder: Path) -> None:
    def lose(ctx: Any, model: Any) -> Any:
        model.lm_head.to("meta")
        return model

    with pytest.raises(AuditError, match=r"'lm_head\.weight' have no values: they are still on"):
        load_with(folder, plugin("loser", "post_load", lose))


@pytest.mark.refused_late  # a plugin that does otherwise than in the rehearsal
def test_a_trainable_set_that_differs_from_the_plan_is_caught(folder: Path) -> None:
    def freeze_later(ctx: Any, model: Any) -> Any:
        model.lm_head.requires_grad_(ctx.rehearsing)
        return model

    with pytest.raises(AuditError) as caught:
        load_with(folder, plugin("fickle", "post_load", freeze_later))
    assert str(caught.value) == (
        "'lm_head.weight' are not trainable, against the plan. A plugin acts on the loaded model"
        " otherwise than in the rehearsal."
    )


@pytest.mark.refused_late  # a plugin that does otherwise than in the rehearsal
def test_numbers_that_differ_from_the_plan_are_caught(folder: Path) -> None:
    def widen_later(ctx: Any, model: Any) -> Any:
        if not ctx.rehearsing:
            model.lm_head.register_parameter(
                "extra", torch.nn.Parameter(torch.ones(3), requires_grad=False)
            )
        return model

    with pytest.raises(AuditError) as caught:
        load_with(folder, plugin("fickle", "post_load", widen_later))
    assert str(caught.value) == (
        "8,784 elements in all parameters were planned, and there are 8,787. A loader or plugin"
        " does otherwise than in the rehearsal: try without it, and report this.\n"
        "35,136 bytes of all parameters were planned, and there are 35,148. A loader or plugin"
        " does otherwise than in the rehearsal: try without it, and report this."
    )


def test_numbers_of_report_and_plan_are_the_same(folder: Path) -> None:
    result = load_with(folder)
    for number in ("parameters", "parameter_bytes", "trainable"):
        assert getattr(result.plan, number) == getattr(result.report, number) > 0
    assert "8,784 parameters in 35,136 bytes, as planned" in result.report.audit


def test_a_tie_that_the_checkpoint_breaks_is_no_difference(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    edit_config(folder, tie_word_embeddings=True)
    result = llmload.load({"model": str(folder)})
    assert result.report.parameters - result.plan.parameters in (0, 128 * 16)


@pytest.mark.refused_late  # a forward shows it
def test_a_model_whose_loss_reaches_no_trainable_parameter_is_caught(folder: Path) -> None:
    def detach(ctx: Any, model: Any) -> Any:
        model.requires_grad_(False)
        model.unused = torch.nn.Linear(2, 2)
        return model

    with pytest.raises(AuditError, match="no gradient reaches any trainable parameter"):
        load_with(folder, plugin("cut", "post_load", detach))


def test_a_warning_of_an_audit_is_in_the_report(folder: Path) -> None:
    def warn(ctx: Any, model: Any) -> list[llmload.Problem]:
        return [llmload.Problem(message="it is a bit large", severity="warning")]

    result = load_with(folder, plugin("picky", "audit", warn))
    assert result.report.warnings == ["plugin 'picky': it is a bit large"]


def test_a_frozen_model_has_no_gradient_path_to_prove(folder: Path) -> None:
    result = load_with(
        folder, plugin("frozen", "post_load", lambda ctx, model: model.requires_grad_(False))
    )
    assert (
        "no parameter is trainable, so no gradient path was looked for, and no forward was run"
    ) in result.report.audit


def test_the_report_says_that_a_wholly_trained_model_was_not_run(folder: Path) -> None:
    result = llmload.load({"model": str(folder)})
    assert (
        "every parameter is trainable, so no gradient path was looked for, and no forward was run"
    ) in result.report.audit


def test_without_proof_the_model_is_handed_out_as_it_is(folder: Path) -> None:
    registry = create_registry(
        [plugin("empty", "load", lambda ctx: ctx.model_class(ctx.config))], environ={}
    )
    assert llmload.load({"model": str(folder)}, registry=registry, prove=False).report.audit == []


# --- strictness ---------------------------------------------------------------------------------


def test_a_missing_head_is_an_error_that_names_it_unless_it_is_excused(folder: Path) -> None:
    keys: dict[str, Any] = {"auto_class": "sequence_classification"}
    with pytest.raises(PlanError) as caught:
        load_with(folder, **keys)
    assert str(caught.value).splitlines()[0] == (
        "strict: the checkpoint has no values for 'score.weight'. Map the keys with `key_map`, or"
        " list what may be newly initialised in `strict: {allow_missing: [...]}`."
    )
    result = load_with(
        folder,
        **keys,
        strict={"allow_missing": ["^score\\."], "allow_unexpected": ["^lm_head\\."]},
    )
    assert set(result.report.newly_initialised) == {"score.weight"}


# --- nothing is left behind ---------------------------------------------------------------------


FULL = {
    "tokenizer": {"pad_token": "eos"},
    "embeddings": {"pad_to_multiple_of": 8},
    "dropout": {},
    "gradient_checkpointing": {},
    "lora": {"r": 2},
}


@pytest.fixture(scope="module")
def warm(folder: Path) -> Path:
    """The folder, after one load: whatever libraries do once, at first use, is done."""
    load_with(folder, **FULL)
    return folder


class Saboteur:
    """Raises at one boundary: before or after every other plugin, in one hook, planned or real."""

    def __init__(
        self, hook: str, first: bool, rehearsing: bool, error: type[BaseException]
    ) -> None:
        self.name = "saboteur"
        self._at = (hook, rehearsing)
        self._error = error
        if first:
            self.before = (
                "tokenizer",
                "embeddings",
                "dropout",
                "lora",
                "streaming",
                "transformers",
            )
        else:
            self.after = ("*",)

    def _maybe(self, hook: str, ctx: Any) -> None:
        if self._at == (hook, ctx.rehearsing):
            raise self._error("sabotage")

    @hookimpl
    def check(self, ctx: Any) -> Any:
        self._maybe("check", ctx)
        return []

    @hookimpl
    def init_context(self, ctx: Any) -> None:
        self._maybe("init_context", ctx)

    @hookimpl
    def load(self, ctx: Any) -> Any:
        self._maybe("load", ctx)
        return Decline("only here to fail")

    @hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        self._maybe("post_load", ctx)
        return model

    @hookimpl
    def wrap_adapter(self, ctx: Any, model: Any) -> Any:
        self._maybe("wrap_adapter", ctx)
        return Decline("only here to fail")

    @hookimpl
    def audit(self, ctx: Any, model: Any) -> Any:
        self._maybe("audit", ctx)
        return []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize(
    ("hook", "rehearsing"),
    [
        ("check", True),
        ("post_load", True),
        ("wrap_adapter", True),
        ("init_context", False),
        ("load", False),
        ("post_load", False),
        ("wrap_adapter", False),
        ("audit", False),
    ],
)
def test_an_error_at_any_hook_boundary_leaves_nothing_behind(
    warm: Path, hook: str, rehearsing: bool, first: bool, error: type[BaseException]
) -> None:
    # With the saboteur last, a built-in loader or adapter answers before it is asked.
    reached = first or hook not in ("load", "wrap_adapter")
    survives = (rehearsing and error is RuntimeError and hook != "check") or not reached
    torch.manual_seed(11)
    before = snapshot()
    sabotage = Saboteur(hook, first, rehearsing, error)
    try:
        load_with(warm, sabotage, **FULL)
    except (LoadFailedError, KeyboardInterrupt):
        assert not survives
    else:
        assert survives
        torch.manual_seed(11)  # a load that succeeds draws the adapter's first values
    assert snapshot() == before


@pytest.mark.parametrize(
    "phase",
    [
        "llmload.hf.locating.resolve",
        "llmload.hf.model_classes.load_config",
        "llmload.hf.model_classes.resolve_class",
        "llmload.loading.planning.Checkpoint.open",
        "llmload.hf.engine.Engine.blank",
        "llmload.loading.audit.hold_to_strict",
        "llmload.loading.audit.compare_with_checkpoint",
        "llmload.loading.audit.prove",
        "llmload.loading.pipeline.installed_versions",
    ],
)
def test_an_error_in_any_phase_of_the_host_leaves_nothing_behind(
    warm: Path, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("sabotage")

    torch.manual_seed(11)
    before = snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(phase, fail)
        with pytest.raises((RuntimeError, LoadFailedError), match="sabotage"):
            load_with(warm, **FULL)
    assert snapshot() == before


def test_a_successful_load_moves_nothing_but_the_random_stream(warm: Path) -> None:
    before = snapshot()
    load_with(warm, **FULL)
    after = snapshot()
    assert before.pop("random") != after.pop("random")
    assert after == before
