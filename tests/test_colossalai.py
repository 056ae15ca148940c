"""Lazy initialisation: the right weights at the end, plain refusals, and nothing left behind."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from sameness import differences, from_pretrained
from stacks import IS_MODERN
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmload
from llmload.builtin.colossalai import booster, lazy_models
from llmload.builtin.colossalai import plugin as plugin
from llmload.errors import LoadFailedError, RequestError
from llmload.testing import snapshot, tiny_llama

pytest.importorskip("colossalai")

HAS_BOOSTER = booster.why_not() is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("lazy"), shards=2)


def load(folder: Path, **keys: Any) -> llmload.LoadResult:
    return llmload.load({"model": str(folder), "colossalai": {}, **keys})


def errors_of(folder: Path, **keys: Any) -> list[str]:
    spec = {"model": str(folder), "colossalai": {}, **keys}
    return [str(problem) for problem in llmload.plan(spec).errors]


# --- filled while loading -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_lazily_built_model_is_what_from_pretrained_gives(
    tmp_path: Path, dtype: str, tied: bool
) -> None:
    folder = tiny_llama(tmp_path, tied=tied, shards=2)
    result = load(folder, dtype=dtype)
    assert differences(result.model, from_pretrained(AutoModelForCausalLM, folder, dtype)) == []
    assert result.report.loader == "streaming"


def test_the_model_is_built_under_the_lazy_context_and_nothing_of_it_stays_lazy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    prepare = lazy_models.LazyPlacement.prepare

    def count(self: Any, model: PreTrainedModel) -> None:
        seen.append(len(list(lazy_models.lazy_tensors(model))))
        prepare(self, model)

    monkeypatch.setattr(lazy_models.LazyPlacement, "prepare", count)
    model = load(folder).model
    assert seen[0] >= len(list(model.parameters()))
    assert list(lazy_models.lazy_tensors(model)) == []
    assert {type(p) for p in model.parameters()} == {nn.Parameter}


def test_weights_of_the_checkpoints_dtype_stay_on_the_pages_of_its_files(folder: Path) -> None:
    result = load(folder, dtype="float32")
    facts = result.report.facts["streaming"]
    assert facts["mapped"] == len(list(result.model.parameters()))
    assert facts["copied"] == 0
    read = sum(file["bytes_read"] for file in facts["files"].values())
    assert read == result.plan.checkpoint_bytes


def test_a_filled_tensor_is_freed_with_its_last_reference(folder: Path) -> None:
    model = load(folder).model
    gone = weakref.ref(model.lm_head.weight)
    model.lm_head.weight = nn.Parameter(torch.zeros(1))
    assert gone() is None


def test_a_missing_head_is_drawn_by_the_models_rules_and_listed(folder: Path) -> None:
    strict = {"allow_missing": ["^score\\."], "allow_unexpected": ["^lm_head\\."]}
    torch.manual_seed(5)
    result = load(folder, auto_class="sequence_classification", strict=strict)
    torch.manual_seed(5)
    plain = llmload.load(
        {"model": str(folder), "auto_class": "sequence_classification", "strict": strict}
    )
    assert result.report.newly_initialised == {"score.weight": "missing from the checkpoint"}
    assert torch.equal(result.model.score.weight, plain.model.score.weight)


def test_lora_after_materialising_is_the_lora_of_an_ordinary_load(folder: Path) -> None:
    lora = {"r": 2, "target_modules": "all-linear"}
    torch.manual_seed(7)
    ours = load(folder, lora=lora).model.state_dict()
    torch.manual_seed(7)
    theirs = llmload.load({"model": str(folder), "lora": lora}).model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_load_under_another_plugin_is_not_lazy(folder: Path) -> None:
    load(folder)
    assert type(torch.empty(1)) is torch.Tensor
    model = llmload.load({"model": str(folder)}).model
    assert {type(p) for p in model.parameters()} == {nn.Parameter}


# --- the lazy context ---------------------------------------------------------------------------


def test_importing_colossalai_leaves_torchs_meta_kernels_as_they_were() -> None:
    lazy_models.lazy_init()
    meta = torch.empty(2, 4, device="meta")
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        torch.empty((), device="meta").item()
    assert torch.ops.aten.roll.default(meta, [1], [0]) is not meta
    statistics = torch.ops.aten.native_layer_norm.default(meta, [4], None, None, 1e-5)[1]
    assert statistics.shape == (2, 1)


def test_what_is_recorded_is_replayed_under_the_dtype_that_is_kept() -> None:
    with lazy_models.lazily("a buffer"):
        steps = torch.arange(0, 4, 2) / 3
    lazy_models.keep_dtype(steps, torch.float64)
    assert steps.materialize().dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32


def test_an_open_context_around_the_load_is_refused(folder: Path) -> None:
    with (
        lazy_models.lazy_init().LazyInitContext(),
        pytest.raises(RequestError) as caught,
        lazy_models.lazily("a model"),
    ):
        pass
    assert str(caught.value) == (
        "a LazyInitContext is open around the load. Close it: the section `colossalai` opens its"
        " own where it is needed."
    )


def colossalai_state() -> dict[str, Any]:
    """What colossalai keeps in classes, beside what any load could leave."""
    module = lazy_models.lazy_init()
    return {
        **snapshot(),
        "all of torch": {k: v for k, v in vars(torch).items() if callable(v)},
        "from_pretrained": vars(PreTrainedModel)["from_pretrained"],
        "replaced": module.LazyInitContext._replaced,
        "changed": module.ConstructorManager.changed,
        "kept from_pretrained": module.PretrainedManager.old_from_pretrained,
        "default device of lazy tensors": module.LazyTensor.default_device,
    }


@pytest.fixture(scope="module")
def warm(folder: Path) -> Path:
    load(folder)
    return folder


@contextmanager
def unchanged() -> Iterator[None]:
    torch.manual_seed(11)
    before = colossalai_state()
    yield
    assert colossalai_state() == before


@pytest.mark.refused_late
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "step",
    [
        "ConstructorManager.apply",
        "ConstructorManager.redo",
        "PretrainedManager.inject",
        "ConstructorManager.clear",
        "PretrainedManager.recover",
    ],
)
def test_an_error_while_entering_or_leaving_the_context_leaves_nothing_behind(
    warm: Path, step: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = step.split(".")

    def fail(*args: Any) -> None:
        raise error("sabotage")

    with unchanged(), monkeypatch.context() as patch:
        # `why_not` tries the context too; it is what the load does that is looked at here.
        patch.setattr(lazy_models, "why_not", lambda: None)
        patch.setattr(getattr(lazy_models.lazy_init(), owner), name, staticmethod(fail))
        with pytest.raises((RequestError, KeyboardInterrupt), match="sabotage"):
            load(warm)


@pytest.mark.refused_late
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "step",
    [
        f"llmload.hf.{'v5' if IS_MODERN else 'v4_51'}.no_init_weights",
        "transformers.LlamaForCausalLM.__init__",
        "transformers.models.llama.modeling_llama.LlamaMLP.__init__",
        "llmload.builtin.colossalai.lazy_models.LazyPlacement.prepare",
        "llmload.builtin.colossalai.lazy_models.LazyPlacement.place",
        "llmload.builtin.colossalai.lazy_models.LazyPlacement.finish",
        "colossalai.lazy.lazy_init.LazyTensor.materialize",
        "colossalai.lazy.lazy_init._convert_cls",
    ],
)
def test_an_error_while_building_or_filling_leaves_nothing_behind(
    warm: Path, step: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("sabotage")

    prepared = plugin.ColossalaiPlugin.init_context

    def sabotage_from_here_on(self: Any, ctx: Any) -> None:
        prepared(self, ctx)
        patch.setattr(step, fail)

    with unchanged(), monkeypatch.context() as patch:
        patch.setattr(
            plugin.ColossalaiPlugin, "init_context", llmload.hookimpl(sabotage_from_here_on)
        )
        with pytest.raises((RequestError, LoadFailedError, KeyboardInterrupt), match="sabotage"):
            load(warm)


def test_a_load_that_succeeds_leaves_nothing_behind(warm: Path) -> None:
    with unchanged():
        load(warm)


def test_a_model_that_cannot_be_built_lazily_is_an_error_that_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looks_at_values(self: Any, config: Any) -> None:
        raise ValueError("needs values")

    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.LlamaMLP.__init__", looks_at_values
    )
    with pytest.raises(RequestError) as caught, lazy_models.lazily("LlamaForCausalLM"):
        looks_at_values(None, None)
    assert str(caught.value) == (
        "LlamaForCausalLM cannot be built under LazyInitContext: ValueError: needs values. Remove"
        " the section `colossalai`."
    )


def test_a_tensor_that_nothing_fills_is_never_replayed_as_memory() -> None:
    with lazy_models.lazily("a layer"):
        layer = nn.Linear(2, 2)
    placement = object.__new__(lazy_models.LazyPlacement)
    with pytest.raises(LoadFailedError) as caught:
        placement.finish(layer)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "'weight', 'bias' got no value. Remove the section `colossalai`, and report this."
    )


# --- what the plan refuses ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"weights": "random"},
            "colossalai: 'colossalai' cannot be combined with 'weights': lazy tensors are filled"
            " from a checkpoint. Remove `colossalai`, or load a checkpoint.",
        ),
        (
            {"colossalai": {"materialize": False}, "device_map": "cpu"},
            "colossalai: 'colossalai' cannot be combined with 'device_map': the Booster chooses the"
            " devices. Remove `device_map`.",
        ),
        (
            {"colossalai": {"materialize": False}, "key_map": {"^a": "b"}},
            "colossalai: 'colossalai' cannot be combined with 'key_map': the Booster finds weights"
            " by their names in the checkpoint. Use `materialize: true`.",
        ),
        (
            {"colossalai": {"materialize": False}, "embeddings": {"pad_to_multiple_of": 8}},
            "colossalai: 'colossalai' cannot be combined with 'embeddings': embeddings are resized"
            " with the weights that the Booster has yet to load. Use `materialize: true`.",
        ),
        (
            {"colossalai": {"tp_size": 2}},
            "colossalai.tp_size: tensor parallelism needs an accelerator for its random states, and"
            " this machine has none. Use `tp_size: 1`, or load where there is one.",
        ),
        (
            {"colossalai": {"plugin": "GeminiPlugin"}},
            "colossalai.plugin: GeminiPlugin needs an accelerator, and this machine has none. Use"
            " HybridParallelPlugin with tp_size 1, or load where there is one.",
        ),
        (
            {"colossalai": {"plugin": "LowLevelZeroPlugin"}},
            "colossalai.plugin: LowLevelZeroPlugin needs an accelerator, and this machine has none."
            " Use HybridParallelPlugin with tp_size 1, or load where there is one.",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused(
    folder: Path, keys: dict[str, Any], message: str
) -> None:
    if torch.cuda.is_available() and "this machine has none" in message:
        pytest.skip("this machine has an accelerator")
    assert message in errors_of(folder, **keys)


def test_a_pipeline_without_an_accelerator_is_a_warning(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has an accelerator")
    plan = llmload.plan({"model": str(folder), "colossalai": {"pp_size": 2}})
    assert plan.errors == []
    assert [str(problem) for problem in plan.warnings] == [
        "colossalai.pp_size: each stage gets its weights here, and cannot be trained: stages talk"
        " over groups that colossalai takes for an accelerator's. Use `pp_size: 1`, or train where"
        " there is an accelerator."
    ]


def test_a_stack_without_colossalai_says_how_to_install_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "version_of", lambda name: None)
    assert errors_of(folder) == [
        "colossalai: colossalai is not installed. Install it with `pip install --no-deps"
        " colossalai==0.5.0`: what it asks for would replace torch and transformers."
    ]


def test_a_colossalai_that_does_something_else_is_found_out_by_trying(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(lazy_models.lazy_init().LazyTensor, "materialize")
    (message,) = errors_of(folder)
    assert message.startswith(
        "colossalai: colossalai 0.5.0 does not give lazy initialisation here: AttributeError: "
    )


@pytest.mark.skipif(HAS_BOOSTER, reason="this stack has Boosters")
def test_without_a_booster_a_model_cannot_stay_lazy(folder: Path) -> None:
    (message,) = errors_of(folder, colossalai={"materialize": False})
    assert message.startswith("colossalai: colossalai 0.5.0 does not give a Booster here: ")
    assert message.endswith(
        "Install the colossalai stack in an environment of its own, in a clone of llmload with `pip"
        " install -c constraints/colossalai.txt '.[colossalai]'`, or use `materialize: true`."
    )
