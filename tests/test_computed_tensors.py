"""What a constructor computes and no checkpoint holds has that value, whichever way it is loaded.

For each class of ``computed_tensors`` and each way of loading, every tensor that the model can
reach is held to the same class built on the CPU and filled from the same file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import computed_tensors
import pytest
import torch
from computed_tensors import RIGHT
from stacks import IS_MODERN
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from zero3.farm import Job, Outcome, launch_once

import llmload
from llmload.builtin.colossalai import lazy_models
from llmload.hookspecs import hookimpl
from llmload.model import reachable
from llmload.testing import tiny_llama

NAMES = [model_class.__name__ for model_class in RIGHT]
LOADERS = ("streaming", "transformers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("computed")
    names = [*NAMES, "FromLargeWeights", "Drawn"]
    return {name: computed_tensors.save(name, tmp / name) for name in names}


def load(
    folders: dict[str, Path], name: str, loader: str = "streaming", **spec: Any
) -> llmload.LoadResult:
    block = {"streaming"} - {loader}
    result = llmload.load(
        computed_tensors.spec(folders[name], name) | spec,
        registry=llmload.create_registry(block=block),
    )
    assert result.report.loader == loader
    return result


def found(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(reachable.tensors(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_has_the_value_that_the_constructor_gives_it(
    name: str, loader: str, dtype: str, folders: dict[str, Path]
) -> None:
    result = load(folders, name, loader, dtype=dtype)
    hold(result, name, folders[name], dtype)


def hold(result: llmload.LoadResult, name: str, folder: Path, dtype: str) -> None:
    """Hold a loaded model to the reference, and its report to what the checkpoint lacks."""
    tensors, kind = found(result.model), getattr(torch, dtype)
    assert computed_tensors.differences(folder, name, tensors, kind) == []
    lacks = computed_tensors.MISSING.get(getattr(computed_tensors, name), ())
    assert sorted(result.report.newly_initialised) == sorted(lacks)


class WholeNumbers(LlamaForCausalLM):
    """Parameters that are not of floating point."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.steps = nn.Parameter(torch.arange(5), requires_grad=False)
        self.mask = nn.Parameter(torch.tensor([True, False]), requires_grad=False)
        self.post_init()


@pytest.mark.parametrize("loader", ["streaming", "transformers"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_missing_parameters_that_are_no_floats_keep_their_kind(
    dtype: str, loader: str, tmp_path: Path
) -> None:
    spec = {
        "model": str(tiny_llama(tmp_path)),
        "auto_class": f"{__name__}:WholeNumbers",
        "dtype": dtype,
        "strict": {"allow_missing": ["steps", "mask"]},
    }
    registry = llmload.create_registry(block={"streaming"} - {loader})
    model: Any = llmload.load(spec, registry=registry).model
    assert torch.equal(model.steps, torch.arange(5))
    assert torch.equal(model.mask, torch.tensor([True, False]))


NOT_LAZILY = {
    "OfManyModules": "cannot be built under LazyInitContext",
    "Views": "'rows[0]' differ from what the model's constructor computes",
} | ({"Aliases": "'same_ramp', 'by_name[ramp]', 'by_name[half]' differ"} if IS_MODERN else {})
"""Classes that colossalai does not build right, with the words by which they are refused."""


@pytest.mark.skipif(lazy_models.why_not() is not None, reason="there is no lazy initialisation")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.refused_late  # what only a lazy build can tell
def test_a_lazily_built_model_has_the_same_values(
    name: str, dtype: str, folders: dict[str, Path]
) -> None:
    if name in NOT_LAZILY:
        with pytest.raises(llmload.LlmloadError) as caught:
            load(folders, name, dtype=dtype, colossalai={})
        assert NOT_LAZILY[name] in str(caught.value)
        return
    hold(load(folders, name, dtype=dtype, colossalai={}), name, folders[name], dtype)


@pytest.mark.parametrize("loader", LOADERS)
def test_an_adapter_sees_the_same_values(loader: str, folders: dict[str, Path]) -> None:
    result = load(folders, "Frequencies", loader, lora={"target_modules": ["q_proj"]})
    assert torch.equal(
        result.model.get_base_model().inv_freq, 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
    )


def test_a_cache_of_the_code_holds_no_tensor_without_values_after_a_load(
    folders: dict[str, Path],
) -> None:
    computed_tensors.steps.cache_clear()
    computed_tensors.tables.clear()
    model = load(folders, "FromCaches", lora={"target_modules": ["q_proj"]}).model
    assert not any(table.is_meta for table in computed_tensors.tables.values())
    ids = torch.arange(4)[None]
    right = computed_tensors.reference(folders["FromCaches"], "FromCaches")
    assert torch.equal(model(ids).logits, right(ids).logits)


def test_the_members_of_a_group_have_the_same_values(folders: dict[str, Path]) -> None:
    spec = computed_tensors.spec(folders["OfManyModules"], "OfManyModules")
    group = llmload.load_group({"models": {"policy": spec, "reference": spec}})
    for member in ("policy", "reference"):
        tensors = found(group[member].model)
        assert computed_tensors.differences(spec["model"], "OfManyModules", tensors) == []


@pytest.mark.refused_late  # whether its class initialises it shows when it does
@pytest.mark.parametrize("loader", LOADERS)
def test_what_depends_on_weights_that_are_not_there_is_refused_by_its_name(
    loader: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(llmload.CheckpointError) as caught:
        load(folders, "FromLargeWeights", loader)
    assert str(caught.value) == (
        "width: no checkpoint key holds it, and what the model's constructor computes for it"
        " depends on weights that it has no values for yet. Save it with the checkpoint (a"
        " persistent buffer), or compute it in the class's `_init_weights`."
    )


@pytest.mark.parametrize("loader", LOADERS)
def test_a_constructor_that_draws_does_not_move_the_random_stream(
    loader: str, folders: dict[str, Path]
) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = load(folders, "Drawn", loader).model
    if IS_MODERN:  # 4.51.3 runs the constructor on the CPU
        assert torch.equal(torch.get_rng_state(), before)
    assert 0.1 < model.drawn.std() < 3
    assert ((model.drawn_too >= 0) & (model.drawn_too < 1)).all()


# --- the audit ----------------------------------------------------------------------------------


class Spoils:
    """A loader that leaves one tensor as it should not be."""

    name = "spoils"
    always_active = True
    before = ("streaming",)

    def __init__(self, path: str) -> None:
        self._path = path

    @hookimpl
    def load(self, ctx: llmload.LoadContext) -> nn.Module:
        model = ctx.model_class.from_pretrained(ctx.folder, config=ctx.config)

        def spoilt(path: str, tensor: torch.Tensor) -> torch.Tensor:
            if path != self._path:
                return tensor
            wrong = torch.full(tensor.shape, 77).to(tensor.dtype)
            return nn.Parameter(wrong) if isinstance(tensor, nn.Parameter) else wrong

        reachable.replace_tensors(model, spoilt)
        return model


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("Frequencies", "inv_freq"),
        ("Frequencies", "model.rotary_emb.inv_freq"),  # of a class of transformers' own
        ("OfManyModules", "extra.1.mask"),
        ("Excused", "window"),
        ("Excused", "gain"),
        ("Excused", "large"),
        ("LetsBeMissing", "slopes.1"),
        ("PlainAttributes", "ramp"),
        ("PlainAttributes", "several[1][deep]"),
        ("PlainAttributes", "notes.scale"),
    ],
)
@pytest.mark.refused_late  # what a loader did, only the model tells
def test_the_audit_finds_a_tensor_that_another_loader_left_with_other_values(
    name: str, path: str, folders: dict[str, Path]
) -> None:
    registry = llmload.create_registry(plugins=[Spoils(path)])
    with pytest.raises(llmload.AuditError) as caught:
        llmload.load(computed_tensors.spec(folders[name], name), registry=registry)
    message = str(caught.value)
    assert f"'{path}'" in message  # 4.51.3 has another name for the frequencies
    assert message.endswith(
        " differ from what the model's constructor computes, and no checkpoint holds them."
        " The loader did not fill them; try another with `-p no:NAME`, and report this."
    )


def test_the_report_says_how_many_tensors_no_checkpoint_holds(folders: dict[str, Path]) -> None:
    result = load(folders, "PlainAttributes")
    number = len(found(result.model)) - len(list(result.model.parameters()))
    assert number > 7
    assert (
        f"{number} tensors that no checkpoint holds have the values of the model's class"
    ) in result.report.audit


# --- under ZeRO-3 -------------------------------------------------------------------------------

WHOLE = "Views"
"""A class with a view of a parameter, which no partitioned parameter has."""
SPLIT = [(n, loader) for n in NAMES if n != WHOLE for loader in ("streaming", "zero3")]
SHARDED = [*SPLIT, (WHOLE, "streaming"), (WHOLE, "zero3")]
SHARDED += [("Drawn", "streaming"), ("Drawn", "zero3"), ("FromLargeWeights", "streaming")]


@pytest.fixture(scope="module")
def ranks(
    tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]
) -> dict[Any, list[Outcome]]:
    def jobs() -> dict[Any, Job]:
        return {
            (name, loader): Job(
                "zero3.computing:load",
                {"folder": str(folders[name]), "name": name, "loader": loader},
                timeout=120,
                refused_late=name in ("FromLargeWeights", WHOLE),  # only building it tells
            )
            for name, loader in SHARDED
        }

    return launch_once(tmp_path_factory, "computed", jobs, timeout=280, at_once=2)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "loader"), SPLIT)
def test_every_rank_has_the_values_of_the_plain_load(
    name: str, loader: str, ranks: dict[Any, list[Outcome]]
) -> None:
    for outcome in ranks[name, loader]:
        assert outcome.code == 0, outcome.output
        expected = {"loader": loader, "partitioned": True, "different": [], "drawn": {}}
        assert outcome.result == expected


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["streaming", "zero3"])
def test_every_rank_has_what_rank_0_drew(loader: str, ranks: dict[Any, list[Outcome]]) -> None:
    first, second = (outcome.result["drawn"] for outcome in ranks["Drawn", loader])
    assert len(first) == 2
    assert first == second


@pytest.mark.slow
def test_every_rank_refuses_by_the_tensors_name(ranks: dict[Any, list[Outcome]]) -> None:
    for outcome in ranks["FromLargeWeights", "streaming"]:
        assert outcome.result is not None, outcome.output
        assert "width: no checkpoint key holds it" in outcome.result["error"]


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["streaming", "zero3"])
def test_a_view_of_a_parameter_that_is_partitioned_is_refused(
    loader: str, ranks: dict[Any, list[Outcome]]
) -> None:
    for outcome in ranks[WHOLE, loader]:
        assert "rows[0]" in outcome.result["error"]
