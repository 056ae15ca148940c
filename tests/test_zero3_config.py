"""The section ``zero3`` and the DeepSpeed config it stands for; no rank and no weight is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import needs_peft, refusal
from stacks import IS_MODERN, needs_bitsandbytes

import llmload
from llmload import testing
from llmload.builtin.zero3 import config
from llmload.builtin.zero3.section import Zero3Section
from llmload.errors import RequestError, SpecError
from llmload.model.partitions import Span
from llmload.plugin import Checkpoint


def resolved(dtype: str = "bfloat16", hidden: int | None = 64, **section: Any) -> Any:
    return config.resolve(Zero3Section(**section), dtype, hidden)


def validate(**section: Any) -> None:
    llmload.create_registry().validate({"model": "m", "zero3": section})


def with_zero(**zero: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3} | zero}


def test_plain_fields_make_a_config_in_the_precision_of_the_model() -> None:
    made = resolved(
        stage3_param_persistence_threshold=0, offload_param={"device": "cpu", "pin_memory": False}
    )
    assert made.stage == 3
    assert made.dtype == "bfloat16"
    assert made.zero["stage3_param_persistence_threshold"] == 0
    assert made.zero["offload_param"]["device"] == "cpu"
    assert made.left == ("train_micro_batch_size_per_gpu",)
    assert made.for_loading()["train_micro_batch_size_per_gpu"] == 1
    assert resolved(dtype="float16").dtype == "float16"
    assert resolved(dtype="float32").dtype == "float32"


def test_config_may_be_a_mapping_or_a_file(tmp_path: Path) -> None:
    content = with_zero() | {"bf16": {"enabled": True}}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content))
    assert resolved(config=content).content == content
    assert resolved(config=str(file)).content == content


def test_auto_is_resolved_by_the_rules_of_the_trainer() -> None:
    found = resolved(
        config=with_zero(
            reduce_bucket_size="auto",
            stage3_prefetch_bucket_size="auto",
            stage3_param_persistence_threshold="auto",
        )
        | {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    )
    assert found.zero["reduce_bucket_size"] == 4096
    assert found.zero["stage3_prefetch_bucket_size"] == 3686
    assert found.zero["stage3_param_persistence_threshold"] == 640
    assert found.content["bf16"] == {"enabled": True}
    assert found.content["fp16"] == {"enabled": False}


def test_what_only_training_needs_stays_auto_and_is_not_seen_while_loading() -> None:
    content = with_zero() | {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    }
    found = resolved(config=content)
    assert found.left == ("train_batch_size", "gradient_clipping", "optimizer.params.lr")
    assert found.content == content
    assert found.for_loading() == with_zero() | {"train_micro_batch_size_per_gpu": 1}


def test_auto_without_a_rule_is_refused_with_the_reason() -> None:
    with pytest.raises(RequestError) as caught:
        resolved(config=with_zero(sub_group_size="auto", reduce_bucket_size="auto"), hidden=None)
    assert [str(problem) for problem in caught.value.problems] == [
        "zero3.config.zero_optimization.sub_group_size: `auto` cannot be resolved here: nothing in"
        " a load says what it is to be. Write the value, or remove the key for DeepSpeed's"
        " default.",
        "zero3.config.zero_optimization.reduce_bucket_size: `auto` cannot be resolved here: it"
        " follows from `hidden_size`, which the model's config lacks. Write the value, or remove"
        " the key for DeepSpeed's default.",
    ]


@pytest.mark.parametrize(
    ("stage", "found"),
    [("auto", "which `accelerate launch` fills in"), (4, "found 4"), (True, "found True")],
)
def test_stage_must_be_known(stage: Any, found: str) -> None:
    with pytest.raises(RequestError) as caught:
        resolved(config={"zero_optimization": {"stage": stage}})
    assert str(caught.value) == (
        f"zero3.config.zero_optimization.stage: expected a ZeRO stage from 0 to 3, {found}."
        ' Write {"zero_optimization": {"stage": 3}}.'
    )


def test_unreadable_config_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "no.json"
    with pytest.raises(RequestError) as caught:
        resolved(config=str(missing))
    assert str(caught.value) == (
        f"{missing}: zero3.config: the DeepSpeed config cannot be read: the file is missing."
        " Check the name."
    )
    listed = tmp_path / "list.json"
    listed.write_text("[3]")
    with pytest.raises(RequestError) as caught:
        resolved(config=str(listed))
    assert str(caught.value) == (
        f"zero3.config: the DeepSpeed config '{listed}' is no mapping of keys to values."
        ' Write at least {"zero_optimization": {"stage": 3}}.'
    )


def test_config_and_plain_fields_exclude_each_other() -> None:
    with pytest.raises(SpecError) as caught:
        validate(config="ds.json", stage=3)
    assert str(caught.value) == (
        "zero3: `config` and `stage` say the same thing twice."
        " Write it into the DeepSpeed config, or remove `config`."
    )
    with pytest.raises(SpecError) as caught:
        validate(offload_param={"device": "nvme"})
    assert str(caught.value) == (
        "zero3.offload_param: `device: nvme` needs `nvme_path`."
        " Name a folder on a local fast disk in `nvme_path`."
    )


def test_another_precision_than_the_models_is_a_problem() -> None:
    found = resolved(config=with_zero())
    assert str(config.precision_problem(found, "bfloat16")) == (
        "zero3: the DeepSpeed config trains in float32, the model's dtype is bfloat16."
        ' Set `dtype: float32` or write "bf16": {"enabled": true} in the DeepSpeed config.'
    )
    found = resolved(config=with_zero() | {"fp16": {"enabled": True}})
    assert str(config.precision_problem(found, "float32")) == (
        "zero3: the DeepSpeed config trains in float16, the model's dtype is float32."
        " Set `dtype: float16`."
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (with_zero(zero_quantized_weights=False, zero_hpz_partition_size=1), None),
        (
            with_zero(zero_quantized_weights=True),
            "`zero_optimization.zero_quantized_weights` quantises the partitions for their way"
            " between ranks",
        ),
        (
            with_zero(zero_hpz_partition_size=8),
            "`zero_optimization.zero_hpz_partition_size` partitions a second time within each host",
        ),
        (
            with_zero(offload_param={"device": "nvme", "nvme_path": "disk"}),
            "`zero_optimization.offload_param` moves the partitions to a disk",
        ),
        (
            with_zero() | {"weight_quantization": {}},
            "`weight_quantization` quantises while the model is built",
        ),
        (
            with_zero() | {"tensor_parallel": {"autotp_size": 2}},
            "`tensor_parallel` splits the modules first",
        ),
    ],
)
def test_what_deepspeed_itself_must_partition(content: dict[str, Any], reason: str | None) -> None:
    assert resolved(config=content).beyond_us() == reason


def test_spans_cover_every_element_once_and_are_of_one_size() -> None:
    for elements in (0, 1, 7, 8, 9, 1000):
        for ranks in (1, 2, 3, 8, 512):
            spans = [Span.of(elements, rank, ranks) for rank in range(ranks)]
            assert [i for s in spans for i in range(s.start, s.stop)] == list(range(elements))
            assert {s.size for s in spans} == {-(-elements // ranks)}


def notes(plan: Any) -> list[str]:
    return [note for step in plan.steps if step.plugin == "zero3" for note in step.notes]


def test_plan_says_what_each_rank_will_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"model": str(testing.tiny_llama(tmp_path)), "zero3": {}}
    plan = llmload.plan(spec)
    assert plan.loader == "streaming"
    # Each rank keeps whole what is no parameter: rotary frequencies, in transformers 5 twice.
    whole = 16 if IS_MODERN else 8
    assert notes(plan)[-4:] == [
        "each rank reads and keeps its own part of every tensor",
        f"each of 2 ranks reads 17,568 of 35,136 bytes and keeps {17568 + whole:,}",
        f"each of 4 ranks reads 8,784 of 35,136 bytes and keeps {8784 + whole:,}",
        f"each of 8 ranks reads 4,392 of 35,136 bytes and keeps {4392 + whole:,}",
    ]
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert notes(llmload.plan(spec))[-1] == (
        f"each of 8 ranks reads 4,392 of 35,136 bytes and keeps {4392 + whole:,}"
    )
    assert (
        "rank 0 reads and from_pretrained partitions: no plugin is selected that asks where each"
        " weight is stored, as `streaming` does"
        in (notes(llmload.plan(spec, registry=llmload.create_registry(block={"streaming"}))))
    )


def test_plan_names_the_loader_where_deepspeed_itself_partitions(tmp_path: Path) -> None:
    config = with_zero(zero_hpz_partition_size=8) | {"fp16": {"enabled": False}}
    spec = {"model": str(testing.tiny_llama(tmp_path)), "zero3": {"config": config}}
    reason = "`zero_optimization.zero_hpz_partition_size` partitions a second time within each host"
    plan = llmload.plan(spec)
    assert plan.loader == "zero3"
    assert plan.declined == {"streaming": f"DeepSpeed partitions: {reason}"}
    assert f"rank 0 reads and from_pretrained partitions: {reason}" in notes(plan)
    without = llmload.plan(spec, registry=llmload.create_registry(block={"streaming"}))
    assert (without.loader, without.declined) == ("zero3", {})


@needs_bitsandbytes
@pytest.mark.parametrize("block", [set(), {"streaming"}])
def test_plan_warns_that_what_is_quantised_in_the_checkpoint_is_whole_on_every_rank(
    block: set[str], tmp_path: Path
) -> None:
    base = testing.tiny_llama(tmp_path)
    quantised = tmp_path / "quantised"
    llmload.load({"model": str(base), "kbit": {"bits": 4}}).model.save_pretrained(quantised)
    nbytes = Checkpoint.open(quantised).total_bytes
    spec = {"model": str(quantised), "kbit": {"bits": 4}, "zero3": {}}
    plan = llmload.plan(spec, registry=llmload.create_registry(block=block))
    assert (
        "zero3: from_pretrained does not partition what is quantised in the checkpoint: every rank"
        f" reads all {nbytes:,} bytes and holds the whole model until DeepSpeed's `initialize`."
        " Load the checkpoint from before it was quantised, with `kbit` if it is to be."
    ) in [str(problem) for problem in plan.warnings]
    assert not [note for step in plan.steps for note in step.notes if "partitions" in note]


@needs_bitsandbytes
@pytest.mark.parametrize("blocked", [False, True])
def test_plan_warns_that_what_from_pretrained_quantises_is_whole_on_every_rank(
    blocked: bool, tmp_path: Path
) -> None:
    folder = testing.tiny_llama(tmp_path)
    zero = {} if blocked else {"zero_hpz_partition_size": 8}
    section = {"config": with_zero(**zero) | {"bf16": {"enabled": False}}}
    spec = {"model": str(folder), "dtype": "float32", "lora": {"r": 2}, "zero3": section}
    registry = llmload.create_registry(block={"streaming"} if blocked else set())
    asked = spec | {"kbit": {"bits": 4}}
    plan = llmload.plan(asked, registry=registry)
    reason = (
        "no plugin is selected that asks where each weight is stored, as `streaming` does"
        if blocked
        else "`zero_optimization.zero_hpz_partition_size` partitions a second time within each host"
    )
    nbytes = Checkpoint.open(folder).total_bytes
    warning = (
        f"zero3: from_pretrained does not partition what it quantises: every rank reads all"
        f" {nbytes:,} bytes and holds the whole model until DeepSpeed's `initialize`. Let"
        f" `streaming` load it, which gives each rank its part, but not here: {reason}."
    )
    assert warning in [str(problem) for problem in plan.warnings]
    assert not [note for step in plan.steps for note in step.notes if "partitions:" in note]
    for other in (llmload.plan(spec, registry=registry), llmload.plan(asked | {"zero3": {}})):
        assert not [problem for problem in other.warnings if "whole model" in problem.message]


def test_lower_stages_leave_the_model_whole(tmp_path: Path) -> None:
    spec = {"model": str(testing.tiny_llama(tmp_path)), "zero3": {"stage": 2}}
    result = llmload.load(spec)
    assert notes(result.plan) == ["ZeRO stage 2: the model stays whole"]
    assert result.report.loader == "streaming"
    assert not any(hasattr(p, "ds_id") for p in result.model.parameters())


def test_disk_is_refused_where_deepspeed_could_not_write_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    folder = str(testing.tiny_llama(tmp_path))
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    disk = {"device": "nvme", "nvme_path": str(tmp_path)}
    found = llmload.plan({"model": folder, "zero3": {"offload_param": disk}}).errors
    assert [str(problem) for problem in found] == [
        "zero3.config.zero_optimization.offload_param: `device: nvme` needs DeepSpeed's operator"
        " async_io, which cannot be built here: libaio or its header libaio.h is missing. Install"
        " libaio (`apt-get install libaio-dev`, `dnf install libaio-devel`), or write"
        " `device: cpu`."
    ]
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: True)
    config = with_zero(offload_param={"device": "nvme"}) | {"fp16": {"enabled": False}}
    found = llmload.plan({"model": folder, "zero3": {"config": config}}).errors
    assert [str(problem) for problem in found] == [
        "zero3.config.zero_optimization.offload_param: `device: nvme` needs `nvme_path`."
        " Name a folder on a local fast disk in `nvme_path`."
    ]


def test_transformers_must_see_the_config_before_it_partitions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.integrations import deepspeed as integration

    from llmload.builtin.zero3.loading_session import GlobalConfig

    before = integration._hf_deepspeed_config_weak_ref
    with GlobalConfig() as owned:
        owned.activate(with_zero() | {"train_micro_batch_size_per_gpu": 1})
        assert integration.is_deepspeed_zero3_enabled()
    assert not integration.is_deepspeed_zero3_enabled()
    monkeypatch.setattr(integration, "is_deepspeed_zero3_enabled", lambda: False)
    with pytest.raises(llmload.LoadFailedError) as caught, GlobalConfig() as owned:
        owned.activate(with_zero() | {"train_micro_batch_size_per_gpu": 1})
    assert str(caught.value) == (
        "transformers does not see the DeepSpeed config, and would load the whole model on every"
        " rank. Report this with the versions of transformers, accelerate and deepspeed."
    )
    assert integration._hf_deepspeed_config_weak_ref is before


def test_device_map_is_refused(tmp_path: Path) -> None:
    folder = str(testing.tiny_llama(tmp_path))
    with pytest.raises(llmload.PlanError) as caught:
        llmload.load({"model": folder, "device_map": "auto", "zero3": {}})
    assert (
        "zero3: 'zero3' cannot be combined with 'device_map': DeepSpeed chooses the device of"
        in str(caught.value)
    )
    assert llmload.plan({"model": folder, "device_map": "cpu", "zero3": {"stage": 0}}).errors == []


@pytest.mark.refused_late  # a plan for ranks can be made where none is
def test_process_without_a_launcher_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RequestError) as caught:
        llmload.load({"model": str(testing.tiny_llama(tmp_path)), "zero3": {}})
    assert str(caught.value).endswith(
        "ZeRO-3 partitions over the ranks of a launcher, and RANK, WORLD_SIZE, LOCAL_RANK,"
        " MASTER_ADDR, MASTER_PORT are not set."
        " Start the script with `torchrun --nproc_per_node N` or `deepspeed`."
    )


def test_adapter_and_copies_of_two_dtypes_are_refused(tmp_path: Path) -> None:
    folder = str(testing.tiny_llama(tmp_path))
    lora: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    spec = {"model": folder, "dtype": "bfloat16", "zero3": {}}
    assert [str(problem) for problem in llmload.plan(spec | {"lora": lora}).errors] == [
        "zero3: trainable parameters are bfloat16 and float32, and DeepSpeed keeps them in one"
        " buffer of one dtype. Set `lora: {adapter_dtype: base}`, or cast what a plugin adds to the"
        " model's dtype."
    ]
    for fine in ({"adapter_dtype": "base"}, {"modules_to_save": None}):
        assert llmload.plan(spec | {"lora": lora | fine}).errors == []
    assert llmload.plan(spec | {"lora": lora, "dtype": "float32"}).errors == []


def test_mixtures_of_experts_are_gathered_as_one() -> None:
    from deepspeed.utils.z3_leaf_module import get_z3_leaf_modules
    from torch import nn

    from llmload.builtin.zero3.leaves import mark_leaf_modules

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Linear(2, 4)

    class LongcatFlashMoE(Stacked):
        pass

    class Mine(Stacked):
        pass

    model = nn.ModuleList([Mixture(), Stacked(), LongcatFlashMoE(), Mine()])
    assert mark_leaf_modules(model, ("Mine",)) == ["LongcatFlashMoE", "Mine", "Mixture"]
    assert get_z3_leaf_modules(model) == [model[0], model[2], model[3]]


def test_ranks_that_do_not_come_to_the_process_group_are_named() -> None:
    from torch.distributed import TCPStore

    from llmload.ranks.launcher import _gather
    from llmload.ranks.notices import Notices

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(llmload.LoadFailedError) as caught:
        _gather(Notices(store, 1, 4, 5.0), 0.5, 15.0, ", or wait")
    assert str(caught.value) == (
        "ranks 0, 2, 3 did not come to the process group within 0.5 s. See how they ended, or wait."
    )


# --- a config that the script has set already -----------------------------------------------------


def announced(theirs: dict[str, Any], **section: Any) -> list[str]:
    """Return the keys by which a section and a script's config differ."""
    try:
        config.resolve(Zero3Section(**section), "float32", 64, theirs)
    except RequestError as error:
        return [problem.where for problem in error.problems]
    return []


def test_plain_fields_leave_the_rest_to_the_config_that_is_set() -> None:
    theirs = with_zero(stage3_param_persistence_threshold=5, overlap_comm=True)
    found = config.resolve(Zero3Section(), "float32", 64, theirs)
    assert found.content == theirs
    assert announced(theirs, stage3_param_persistence_threshold=5) == []
    assert announced(theirs, stage3_param_persistence_threshold=6) == [
        "zero3.stage3_param_persistence_threshold"
    ]
    assert "zero3.offload_param.device" in announced(theirs, offload_param={"device": "cpu"})
    assert announced({"zero_optimization": {"stage": 2}}) == ["zero3.stage"]


def test_two_whole_configs_must_say_the_same_of_what_partitions() -> None:
    theirs = with_zero(reduce_bucket_size="auto") | {"bf16": {"enabled": False}}
    assert announced(theirs, config=theirs) == []
    assert announced(theirs, config=with_zero() | {"gradient_clipping": 1.0}) == []
    assert announced(theirs, config=theirs | {"bf16": {"enabled": True}}) == [
        "zero3.config.bf16.enabled"
    ]
    assert announced(theirs, config=with_zero(offload_param={"device": "cpu"})) == [
        "zero3.config.zero_optimization.offload_param.device"
    ]
    assert announced(with_zero(sub_group_size=7), config=with_zero()) == [
        "zero3.config.zero_optimization.sub_group_size"
    ]


@pytest.mark.parametrize("inline", [False, True])
def test_a_file_of_something_else_is_no_deepspeed_config(tmp_path: Path, inline: bool) -> None:
    other = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "bf16"}
    file = tmp_path / "accelerate.yaml"
    file.write_text(json.dumps(other))
    section = Zero3Section(config=other if inline else str(file))
    with pytest.raises(RequestError) as caught:
        config.read(section)
    assert str(caught.value) == (
        f"zero3.config: {'the mapping' if inline else repr(str(file))} has none of DeepSpeed's"
        " keys: it has compute_environment, mixed_precision. Give a DeepSpeed config, with at"
        ' least {"zero_optimization": {"stage": 3}}.'
    )


@needs_peft("0.15.0")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_rows_to_train_need_a_gpu_to_be_shared_among_ranks(tmp_path: Path) -> None:
    section = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}
    asked = with_zero() | {"train_micro_batch_size_per_gpu": 1}
    assert refusal(testing.tiny_llama(tmp_path), section, zero3={"config": asked}) == (
        "lora.trainable_token_indices: under ZeRO-3 PEFT shares rows to train among the ranks by a"
        " GPU, and there is none. Load without `zero3`, or where there are GPUs."
    )


@needs_peft("0.18.0")
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens"]])
def test_tied_adapters_cannot_be_parted_and_what_the_refusal_says_can(
    targets: list[str], tmp_path: Path
) -> None:
    folder = testing.tiny_llama(tmp_path, tied=True)
    section = {"r": 2, "target_modules": targets, "ensure_weight_tying": True}
    zero3 = {"config": with_zero() | {"train_micro_batch_size_per_gpu": 1}}
    assert refusal(folder, section, zero3=zero3) == (
        "lora.ensure_weight_tying: `zero3` keeps a part of each parameter on each rank, and the"
        " adapter of 'lm_head' is a transposed view of the embedding's, whose parts are others."
        " Write `tied_weights: separate` or `untie` in its place, or name the embedding in"
        " `modules_to_save`."
    )
    for way in (
        {"target_modules": targets, "tied_weights": "separate"},
        {"target_modules": targets, "tied_weights": "untie"},
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ):
        spec = {"model": str(folder), "zero3": zero3, "lora": {"r": 2, **way}}
        assert llmload.plan(spec).errors == []


PLAIN = {"train_micro_batch_size_per_gpu": 1}


@pytest.mark.parametrize("auto_class", ["sequence_classification", "token_classification"])
def test_a_classifiers_head_and_an_adapter_of_another_dtype_are_refused_in_the_plan(
    auto_class: str, tmp_path: Path
) -> None:
    model = testing.tiny_model("bert", auto_class=auto_class, dtype=torch.bfloat16)
    spec = {
        "model": str(testing.save_checkpoint(model, tmp_path)),
        "auto_class": auto_class,
        "zero3": {"config": with_zero() | PLAIN | {"bf16": {"enabled": True}}},
        "lora": {"r": 2, "target_modules": ["query"]},
    }
    words = "trainable parameters are bfloat16 and float32, and DeepSpeed keeps them in one buffer"
    assert words in str(llmload.plan(spec).errors[0])
    mended = spec | {"lora": spec["lora"] | {"adapter_dtype": "base"}}  # type: ignore[operator]
    assert llmload.plan(mended).errors == []


def test_biases_that_an_adapter_trains_are_refused_in_another_dtype_too(tmp_path: Path) -> None:
    model = testing.tiny_model("gpt2", dtype=torch.bfloat16)
    lora = {"r": 2, "target_modules": ["c_attn"], "bias": "all"}
    zero3 = {"config": with_zero() | PLAIN | {"bf16": {"enabled": True}}}
    found = refusal(testing.save_checkpoint(model, tmp_path), lora, zero3=zero3)
    assert "trainable parameters are bfloat16 and float32" in found


class Valued:
    """Adds a head that is trained, in a dtype of its own."""

    name = "valued"
    stage = "heads"

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    @llmload.hookimpl
    def post_load(self, ctx: llmload.LoadContext, model: torch.nn.Module) -> torch.nn.Module:
        device = next(model.parameters()).device
        model.value = torch.nn.Linear(16, 1, dtype=self._dtype, device=device)
        return model


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapter"])
def test_a_head_that_a_plugin_adds_in_another_dtype_is_refused_in_the_plan(
    lora: bool, tmp_path: Path
) -> None:
    model = testing.tiny_model("llama", dtype=torch.bfloat16)
    spec: dict[str, Any] = {
        "model": str(testing.save_checkpoint(model, tmp_path)),
        "zero3": {"config": with_zero() | PLAIN | {"bf16": {"enabled": True}}},
    }
    if lora:
        spec["lora"] = {"r": 2, "target_modules": ["q_proj"], "adapter_dtype": "base"}
        spec["lora"]["modules_to_save"] = ["value"]  # else the head is frozen with the base
    for dtype, number in ((torch.float32, 1), (torch.float16, 1), (torch.bfloat16, 0)):
        registry = llmload.create_registry(plugins=[Valued(dtype)])
        errors = llmload.plan(spec, registry=registry).errors
        assert len(errors) == number
        if errors:
            trained = " and ".join(sorted(("bfloat16", str(dtype)[6:])))
            assert f"trainable parameters are {trained}" in str(errors[0])


# --- a config that the script has set ---------------------------------------------------------


def planned_under(content: dict[str, Any], spec: dict[str, Any]) -> list[str]:
    """Plan while a DeepSpeed config is set for transformers; returns the errors."""
    from transformers.integrations import HfDeepSpeedConfig

    announced = HfDeepSpeedConfig(content)
    errors = [str(problem) for problem in llmload.plan(spec).errors]
    assert announced.is_zero3()
    return errors


SET = "a DeepSpeed config of ZeRO-3 is set, as `TrainingArguments(deepspeed=...)` does, and"


@pytest.mark.parametrize(
    ("precision", "dtype", "made"),
    [
        ({"bf16": {"enabled": True}}, "float32", "bfloat16"),
        ({"fp16": {"enabled": True}}, "bfloat16", "float16"),
        ({"bf16": {"enabled": False}}, "bfloat16", "float32"),
        ({"bf16": {"enabled": True}}, "bfloat16", None),
        ({"bf16": {"enabled": "auto"}}, "bfloat16", None),
        ({}, "float32", None),
    ],
)
def test_another_dtype_than_that_of_a_config_that_is_set_is_refused_in_the_plan(
    precision: dict[str, Any], dtype: str, made: str | None, tmp_path: Path
) -> None:
    spec = {"model": str(testing.tiny_llama(tmp_path)), "dtype": dtype}
    expected = (
        f"dtype: {SET} makes every parameter in {made}, where the model's is {dtype}. Set"
        f" `dtype: {made}`, or have the config train in {dtype}."
    )
    assert planned_under(with_zero() | precision, spec) == ([expected] if made else [])


def test_a_device_map_beside_a_config_that_is_set_is_refused_in_the_plan(tmp_path: Path) -> None:
    spec = {"model": str(testing.tiny_llama(tmp_path)), "device_map": "cpu"}
    assert planned_under(with_zero(), spec) == [
        f"device_map: {SET} DeepSpeed chooses the device of each partition. Remove `device_map`."
    ]
