"""What a Booster makes of a model that was left lazy: the checkpoint's weights, the same step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from once import once
from torch import nn

import llmload
from llmload import hookimpl
from llmload.errors import AuditError, PlanError
from llmload.hf import installed_transformers
from llmload.testing import save_checkpoint, tiny_llama, tiny_model

pytest.importorskip("colossalai")

from llmload.builtin.colossalai import booster, lazy_models

pytestmark = pytest.mark.skipif(
    booster.why_not() is not None, reason="only the colossalai stack has Boosters"
)

LORA = {"r": 2, "target_modules": "all-linear"}
LAZY = {"colossalai": {"materialize": False}}


def job(
    folder: Path,
    *,
    step: bool = True,
    dtype: str = "float32",
    plugin: str = "HybridParallelPlugin",
    options: dict[str, Any] | None = None,
    materialize: bool = False,
    **keys: Any,
) -> dict[str, Any]:
    """What to load, how to boost it, and whether to train it a step."""
    if plugin == "HybridParallelPlugin":
        # Any other precision has the Booster cast everything, buffers too.
        options = {"tp_size": 1, "pp_size": 1, "precision": "fp32", **(options or {})}
    return {
        "spec": {"model": str(folder), "dtype": dtype, **keys},
        "plugin": plugin,
        "options": options or {},
        "materialize": materialize,
        "step": step,
    }


def boost(jobs: list[dict[str, Any]], *, ranks: int) -> list[list[dict[str, Any]]]:
    """Do jobs one after another on so many ranks; returns what each rank found, by job."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*torchrun, f"--nproc-per-node={ranks}", "boosting.py", json.dumps(jobs)],
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"rank"')]
    assert len(lines) == ranks * len(jobs), run.stdout
    lines.sort(key=lambda line: (line["job"], line["rank"]))
    return [lines[start : start + ranks] for start in range(0, len(lines), ranks)]


def test_the_report_says_that_nothing_is_read_before_the_booster_does(tmp_path: Path) -> None:
    result = llmload.load({"model": str(tiny_llama(tmp_path, shards=2)), **LAZY})
    files = result.report.facts[result.report.loader]["files"]
    assert sum(file["tensor_bytes"] for file in files.values()) == result.plan.checkpoint_bytes
    assert {(file["bytes_read"], file["reads"]) for file in files.values()} == {(0, 0)}
    assert len(files) > 1


# --- boosted on CPU with gloo -------------------------------------------------------------------


@pytest.fixture(scope="module")
def boosted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[Any]]:
    """What each rank found, by job and number of ranks."""
    return once(tmp_path_factory, "boosted", lambda: _boosted(tmp_path_factory.mktemp("models")))


def _boosted(tmp: Path) -> dict[tuple[str, int], list[Any]]:
    untied, tied = (tiny_llama(tmp, name=str(tied), tied=tied, shards=2) for tied in (False, True))
    stages = {"pp_size": 2, "num_microbatches": 2}
    jobs = {
        ("untied", 1): job(untied),
        ("tied", 1): job(tied),
        ("lora", 1): job(untied, lora=LORA),
        ("cast", 1): job(untied, dtype="bfloat16", step=False),
        ("untied", 2): job(untied),
        ("tied", 2): job(tied),
        # Its step needs an accelerator: stages talk over a group that colossalai takes for NCCL's.
        ("stages", 2): job(untied, step=False, options=stages),
        ("ddp", 2): job(untied, plugin="TorchDDPPlugin", materialize=True),
    }
    found = {}
    for ranks in (1, 2):
        names = [name for name in jobs if name[1] == ranks]
        found |= zip(names, boost([jobs[name] for name in names], ranks=ranks), strict=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["untied", "tied"])
def test_a_lazy_model_is_boosted_to_the_checkpoint_and_takes_the_eager_models_step(
    boosted: dict[tuple[str, int], list[Any]], name: str, ranks: int
) -> None:
    for found in boosted[name, ranks]:
        assert found["lazy"] > 0
        assert found["different"] == []
        assert found["losses"][0] == found["losses"][1]
        assert found["different after a step"] == []


@pytest.mark.slow
def test_lora_on_a_lazy_model_is_boosted_and_takes_the_eager_models_step(
    boosted: dict[tuple[str, int], list[Any]],
) -> None:
    (found,) = boosted["lora", 1]
    assert found["lazy"] > 0
    assert found["different"] == []
    assert found["losses"][0] == found["losses"][1]
    assert found["different after a step"] == []


@pytest.mark.slow
def test_a_cast_holds_whatever_the_default_dtype_when_the_model_is_boosted(
    boosted: dict[tuple[str, int], list[Any]],
) -> None:
    (found,) = boosted["cast", 1]
    assert found["lazy"] > 0
    assert found["different"] == []


@pytest.mark.slow
def test_each_stage_of_a_pipeline_gets_its_weights(
    boosted: dict[tuple[str, int], list[Any]],
) -> None:
    first, second = boosted["stages", 2]
    assert first["different"] == second["different"] == []
    assert 0 < first["tensors"] < first["lazy"]
    assert 0 < second["tensors"] < second["lazy"]


@pytest.mark.slow
def test_pytorch_ddp_takes_a_model_that_was_filled_while_loading(
    boosted: dict[tuple[str, int], list[Any]],
) -> None:
    for found in boosted["ddp", 2]:
        assert found["lazy"] == 0
        assert found["different"] == found["different after a step"] == []
        assert found["losses"][0] == found["losses"][1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("plugin", "options", "materialize"),
    [
        ("HybridParallelPlugin", {}, False),
        ("GeminiPlugin", {"precision": "bf16"}, False),
        ("LowLevelZeroPlugin", {"stage": 2, "precision": "bf16"}, True),
        ("TorchDDPPlugin", {}, True),
    ],
)
def test_booster_plugins_hold_the_checkpoint_on_a_gpu(
    tmp_path: Path, plugin: str, options: dict[str, Any], materialize: bool
) -> None:
    folder = tiny_llama(tmp_path, dtype=torch.bfloat16)
    asked = job(
        folder,
        dtype="bfloat16",
        plugin=plugin,
        options=options | ({"precision": "bf16"} if plugin == "HybridParallelPlugin" else {}),
        materialize=materialize,
    )
    ((found,),) = boost([asked], ranks=1)
    assert found["different when saved"] == []
    assert found["losses"][0] == pytest.approx(found["losses"][1], rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("options", [{"tp_size": 2}, {"pp_size": 2, "num_microbatches": 2}])
def test_a_lazy_model_is_cut_over_two_gpus(tmp_path: Path, options: dict[str, int]) -> None:
    asked = job(tiny_llama(tmp_path), step="tp_size" in options, options=options)
    (found,) = boost([asked], ranks=2)
    assert all(rank["different when saved"] == [] for rank in found)
    if "tp_size" in options:
        losses = found[0]["losses"]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- handed over --------------------------------------------------------------------------------


def lazy(folder: Path, *plugins: object, **keys: Any) -> llmload.LoadResult:
    registry = llmload.create_registry(plugins)
    return llmload.load({"model": str(folder), **LAZY, **keys}, registry=registry)


@pytest.mark.parametrize("shards", [1, 2])
def test_the_checkpoint_is_recorded_where_the_booster_looks(tmp_path: Path, shards: int) -> None:
    from colossalai.interface.pretrained import get_pretrained_path

    folder = tiny_llama(tmp_path, shards=shards)
    result = lazy(folder)
    name = "model.safetensors" if shards == 1 else "model.safetensors.index.json"
    assert get_pretrained_path(result.model) == str(folder / name)
    assert {type(p).__name__ for p in result.model.parameters()} == {"LazyTensor"}
    assert result.report.loader == "colossalai"
    assert "the weights come with Booster.boost" in result.report.audit
    assert not result.model.training


def test_a_missing_head_has_its_values_before_the_booster_comes(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "auto_class": "sequence_classification",
        "strict": {"allow_missing": ["^score\\."], "allow_unexpected": ["^lm_head\\."]},
    }
    folder = tiny_llama(tmp_path)
    torch.manual_seed(5)
    ours = lazy(folder, **keys)
    torch.manual_seed(5)
    theirs = llmload.load({"model": str(folder), **keys}).model
    assert type(ours.model.score.weight) is nn.Parameter
    assert torch.equal(ours.model.score.weight, theirs.score.weight)
    assert ours.report.newly_initialised == {"score.weight": "missing from the checkpoint"}


def test_a_name_the_booster_would_not_find_is_an_error(tmp_path: Path) -> None:
    base = tiny_model("llama").model
    folder = save_checkpoint(base, tmp_path / "base")
    with pytest.raises(PlanError) as caught:
        lazy(folder, auto_class="causal_lm", strict=False)
    assert str(caught.value) == (
        "plugin 'colossalai': Booster.boost would load nothing into 'model.embed_tokens.weight',"
        " 'model.layers.0.self_attn.q_proj.weight', 'model.layers.0.self_attn.k_proj.weight' and"
        " 17 more: it finds weights by their names in the checkpoint. Use `materialize: true`."
    )


def test_an_adapter_that_hides_weights_from_the_booster_is_an_error(tmp_path: Path) -> None:
    # PEFT keeps the factors of an embedding where PeftUnwrapMixin does not look.
    with pytest.raises(PlanError) as caught:
        lazy(tiny_llama(tmp_path), lora={"r": 2, "target_modules": ["embed_tokens"]})
    assert str(caught.value) == (
        "plugin 'colossalai': Booster.boost would load nothing into"
        " 'base_model.model.model.embed_tokens.base_layer.weight': it finds weights by their names"
        " in the checkpoint. Use `materialize: true`."
    )


@pytest.mark.refused_late  # a plugin against another
def test_a_plugin_that_changes_values_which_are_yet_to_come_is_an_error(tmp_path: Path) -> None:
    class Doubles:
        name = "doubles"

        @hookimpl
        def post_load(self, ctx: Any, model: Any) -> Any:
            if not ctx.rehearsing:
                model.lm_head.weight.data.mul_(2.0)
            return model

    with pytest.raises(AuditError) as caught:
        lazy(tiny_llama(tmp_path), Doubles())
    assert str(caught.value) == (
        "plugin 'colossalai': 'lm_head.weight' were changed or computed with before Booster.boost"
        " loads their values. Use `materialize: true`."
    )


def errors_of(folder: Path, **keys: Any) -> list[str]:
    return [str(p) for p in llmload.plan({"model": str(folder), **LAZY, **keys}).errors]


@pytest.mark.parametrize(
    ("lora", "what"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_an_adapter_that_starts_from_the_weights_is_refused(
    tmp_path: Path, lora: dict[str, Any], what: str
) -> None:
    assert errors_of(tiny_llama(tmp_path), lora={**LORA, **lora}) == [
        f"colossalai.materialize: the adapter starts from the base's values ({what}), which come"
        " with Booster.boost. Use `materialize: true`."
    ]


def test_an_adapter_of_another_name_is_refused(tmp_path: Path) -> None:
    assert errors_of(tiny_llama(tmp_path), lora={**LORA, "adapter_name": "other"}) == [
        "lora.adapter_name: a Booster finds the weights under an adapter only if it is called"
        " 'default', and this one is called 'other'. Leave out `adapter_name`, or use"
        " `materialize: true`."
    ]


@pytest.mark.parametrize(
    ("plugin", "what"),
    [
        ("TorchDDPPlugin", "ends the process on a lazy model, with a segmentation fault"),
        ("LowLevelZeroPlugin", "leaves a lazy model lazy, without weights"),
    ],
)
def test_booster_plugins_that_know_no_lazy_tensors_are_refused_a_lazy_model(
    tmp_path: Path, plugin: str, what: str
) -> None:
    section = {"materialize": False, "plugin": plugin}
    assert errors_of(tiny_llama(tmp_path), colossalai=section)[0] == (
        f"colossalai.plugin: {plugin} {what}. Use `materialize: true`."
    )


def test_modules_that_stay_float32_are_refused_a_lazy_model(tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_model("t5", auto_class="seq2seq_lm"), tmp_path / "t5")
    assert errors_of(folder, auto_class="seq2seq_lm", dtype="float16") == [
        "colossalai.materialize: 'wo' of T5ForConditionalGeneration stay float32 beside float16,"
        " which a lazy model cannot tell the Booster. Use `materialize: true`, or another `dtype`."
    ]


def test_a_recorded_dtype_outlives_the_load(tmp_path: Path) -> None:
    model = lazy(tiny_llama(tmp_path), dtype="bfloat16").model
    lazy_models.lazy_init().LazyInitContext.materialize(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert installed_transformers().config_dtype(model.config) == torch.bfloat16


def test_a_model_that_stays_lazy_is_not_saved(tmp_path: Path) -> None:
    spec = {"model": str(tiny_llama(tmp_path)), **LAZY}
    with pytest.raises(llmload.PlanError) as caught:
        llmload.save(spec, tmp_path / "out")
    assert str(caught.value) == (
        "the model has no weights to save: they come with Booster.boost. Save it after"
        " Booster.boost, by its own means, or load it without."
    )
