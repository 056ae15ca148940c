"""What a plan says of memory is what the load has then, byte by byte; and too little is refused."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import IS_MODERN, needs_transformers_5
from typer.testing import CliRunner

import llmload
from llmload.cli.commands import app
from llmload.context.optimizers import STATES
from llmload.loading.forecasting import ALLOCATOR
from llmload.loading.memory import Memory
from llmload.plugin import Cost, partitions
from llmload.testing import tiny_checkpoint

ADAPTER = {"lora": {"r": 4, "target_modules": "all-linear"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("memory") / "model")


def planned(folder: Path, machine: llmload.Machine | None = None, **keys: Any) -> llmload.Plan:
    return llmload.plan({"model": str(folder), **keys}, machine=machine or llmload.Machine())


def statistics(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for module in (m for m in model.modules() if not hasattr(m, "base_layer")):
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            yield state.absmax
            if state.nested:
                yield state.state2.absmax
                yield state.offset.reshape(1)


def held(model: torch.nn.Module) -> int:
    """Bytes of everything that a model holds."""
    tensors = [*model.parameters(), *model.buffers(), *statistics(model)]
    return sum(partitions.nbytes(tensor) for tensor in tensors)


def kept_by_the_allocator(memory: Memory) -> int:
    return sum(item.nbytes for item in memory.items if item.what == ALLOCATOR)


SPECS: dict[str, dict[str, Any]] = {
    "as it is stored": {},
    "cast": {"dtype": "bfloat16"},
    "modules cast": {"dtype": "bfloat16", "cast": {"modules": {"norm": "float32"}}},
    "an adapter": ADAPTER,
    "an adapter in bfloat16": {"lora": {**ADAPTER["lora"], "adapter_dtype": "bfloat16"}},
    "more rows": {"embeddings": {"pad_to_multiple_of": 512}},
    "random": {"weights": "random"},
    "4 bits": {"kbit": {}, **ADAPTER},
    "4 bits, statistics too": {"kbit": {"double_quant": True}, **ADAPTER},
    "4 bits, the rest in float32": {"kbit": {"prepare": "legacy"}, "dtype": "bfloat16", **ADAPTER},
}


@pytest.mark.parametrize("name", SPECS)
def test_what_is_foretold_is_what_the_model_holds(name: str, folder: Path) -> None:
    if "bits" in name and not IS_MODERN:
        pytest.skip("bitsandbytes on a CPU needs transformers 5")
    result = llmload.load({"model": str(folder), **SPECS[name]})
    memory = result.plan.memory
    assert memory is not None
    used = memory.peak("use")
    assert used is not None
    assert used.host + used.pages - kept_by_the_allocator(memory) == held(result.model)
    assert {route.name for route in memory.routes} == dict(result.model.named_parameters()).keys()


def test_what_an_adapter_is_merged_into_lies_on_no_page(folder: Path, tmp_path: Path) -> None:
    llmload.load({"model": str(folder), **ADAPTER}).model.save_pretrained(tmp_path)
    keys = {"lora": {"adapter": str(tmp_path), "merge": True}}
    result = llmload.load({"model": str(folder), **keys})
    memory = result.plan.memory
    assert memory is not None
    routes = {route.name: route.route for route in memory.routes}
    assert routes["model.layers.0.mlp.up_proj.weight"] == "merged"
    assert routes["model.embed_tokens.weight"] == "mapped"
    used = memory.peak("use")
    assert used is not None
    assert used.host + used.pages - kept_by_the_allocator(memory) == held(result.model)


@pytest.mark.parametrize(
    ("keys", "route"),
    [
        ({}, "mapped"),
        ({"dtype": "bfloat16"}, "cast"),
        ({"streaming": {"mapped": False}}, "copied"),
        ({"weights": "random"}, "new"),
    ],
)
def test_each_weight_has_its_route_and_the_reason(
    keys: dict[str, Any], route: str, folder: Path
) -> None:
    memory = planned(folder, **keys).memory
    assert memory is not None
    assert {found.route for found in memory.routes} == {route}
    assert all(found.why for found in memory.routes)


def trained(name: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return {
        "adamw_torch": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
        "rmsprop": torch.optim.RMSprop,
        "adagrad": torch.optim.Adagrad,
        "adafactor": Adafactor,
    }[name](parameters)


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", "rmsprop", "adagrad", "adafactor"])
def test_gradients_and_states_of_a_step_are_as_foretold(name: str, folder: Path) -> None:
    result = llmload.load({"model": str(folder), **ADAPTER})
    made = planned(folder, llmload.Machine(optimizer=name), **ADAPTER).memory
    assert made is not None
    foretold = {item.what: item.nbytes for item in made.items if item.phase == "train"}
    parameters = [p for p in result.model.parameters() if p.requires_grad]
    optimizer = trained(name, parameters)
    ids = torch.arange(8).unsqueeze(0)
    result.model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert foretold["gradients"] == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    states = [
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim()
    ]
    assert foretold.get(f"optimizer {name}", 0) == sum(states)


def test_states_in_8_bits_are_whole_where_a_parameter_is_small() -> None:
    assert STATES["adamw_bnb_8bit"]((64, 63), 4) == 2 * 4 * 64 * 63
    assert STATES["adamw_bnb_8bit"]((64, 64), 4) == 2 * (4096 + 4 * 16)


@needs_transformers_5
def test_a_rank_of_64_keeps_its_part_and_a_step_its_states_in_float32(folder: Path) -> None:
    machine = llmload.Machine(ranks=64, device_memory="80GB")
    made = planned(folder, machine, dtype="bfloat16", zero3={})
    memory = made.memory
    assert memory is not None
    sizes = [-(-torch.Size(route.shape).numel() // 64) for route in memory.routes]
    assert [route.kept_bytes for route in memory.routes] == [2 * size for size in sizes]
    items = {item.what: item for item in memory.items if item.phase == "train"}
    assert items["optimizer adamw_torch_fused"].nbytes == 12 * sum(sizes)
    assert items["gradients"].place == "device"
    assert (memory.ranks, memory.ranks_per_host) == (64, 8)


@needs_transformers_5
@pytest.mark.parametrize(("device", "place"), [("none", "device"), ("cpu", "host")])
def test_an_offloaded_optimizer_is_foretold_on_the_host(
    folder: Path, device: str, place: str
) -> None:
    offload = {"device": device}
    config = {
        "zero_optimization": {"stage": 3, "offload_optimizer": offload},
        "bf16": {"enabled": True},
    }
    machine = llmload.Machine(ranks=2, device_memory="80GB")
    memory = planned(folder, machine, dtype="bfloat16", zero3={"config": config}).memory
    assert memory is not None
    places = {item.what: item.place for item in memory.items if item.phase == "train"}
    assert places["gradients"] == places["optimizer adamw_torch_fused"] == place
    assert places["gradients in the optimizer's dtype"] == place
    assert places["gathered weights"] == "device"


@needs_transformers_5
def test_a_step_under_zero3_lays_out_a_bucket_and_a_sub_group_of_gradients(folder: Path) -> None:
    stage = {"stage": 3, "reduce_bucket_size": 1000, "sub_group_size": 500}
    config = {"zero_optimization": stage, "bf16": {"enabled": True}}
    machine = llmload.Machine(ranks=2)
    memory = planned(folder, machine, dtype="bfloat16", zero3={"config": config}).memory
    assert memory is not None
    items = {item.what: item for item in memory.items if item.phase == "train"}
    assert items["gradients on their way"].nbytes == 2 * 1000
    assert items["gradients in the optimizer's dtype"].nbytes == (2 + 4) * 500


def test_a_load_that_cannot_fit_is_refused_with_what_would(folder: Path) -> None:
    made = planned(folder, llmload.Machine(host_memory="8kB", optimizer="none"), dtype="float16")
    (problem,) = made.errors
    assert problem.message == (
        "the load takes 17.2 KiB of memory, and 7.8 KiB of memory are free (as the plan supposes)"
    )
    if IS_MODERN:
        assert "Load with `zero3: {}` on 32 ranks." in problem.fix


@needs_transformers_5
def test_fewer_bits_are_offered_where_they_do(folder: Path) -> None:
    made = planned(folder, llmload.Machine(device_memory="60kB"))
    (problem,) = made.warnings
    assert problem.message == (
        "a training with adamw_torch_fused takes 137.2 KiB of the accelerator's memory before any"
        " activation, and 58.6 KiB of memory are free (as the plan supposes)"
    )
    assert problem.fix.startswith("Quantise to 4 bits with `kbit: {}` and train an adapter")


def test_ranks_of_a_host_need_its_memory_together(folder: Path) -> None:
    machine = llmload.Machine(ranks=4, host_memory="20kB", optimizer="none")
    (problem,) = planned(folder, machine, dtype="float16").errors
    assert "17.2 KiB of memory in each of 4 processes, 68.7 KiB together" in problem.message


def test_without_advice_the_refusal_says_what_always_helps(folder: Path) -> None:
    registry = llmload.create_registry(block=["kbit", "zero3", "parallel"])
    spec = {"model": str(folder), "dtype": "float16"}
    made = llmload.plan(spec, registry=registry, machine=llmload.Machine(host_memory=100))
    (problem,) = made.errors
    assert problem.fix.startswith("Give it more, load in a narrower dtype")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ranks": 0}, "ranks: expected a number of processes, found 0. Give 1 or more."),
        (
            {"host_memory": "a lot"},
            "host_memory: 'a lot' is no amount of memory. Write a number and a unit, such as 80GB"
            " (10**9 bytes) or 80GiB (2**30).",
        ),
        (
            {"optimizer": "adamw"},
            "optimizer: what the optimizer 'adamw' keeps is not known. Did you mean 'adamw_torch'?",
        ),
    ],
)
def test_a_machine_that_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(llmload.RequestError) as told:
        llmload.Machine(**given)
    assert str(told.value) == said


def test_sizes_are_decimal_or_binary_as_they_are_written() -> None:
    machine = llmload.Machine(host_memory="1.5 GiB", device_memory="80GB")
    assert (machine.host_memory, machine.device_memory) == (3 * 2**29, 80 * 10**9)


def test_a_device_that_is_not_here_can_be_planned_for(folder: Path) -> None:
    machine = llmload.Machine(device_memory="80GB")
    made = planned(folder, machine, device_map="cuda:0")
    assert not made.errors
    assert made.memory is not None
    loaded = made.memory.peak("load")
    assert loaded is not None
    assert (loaded.device > 0, loaded.pages) == (True, 0)


def test_pinned_memory_on_the_way_to_a_device_is_counted_where_a_weight_is_worth_it(
    folder: Path, tmp_path: Path
) -> None:
    def pinned(folder: Path, **keys: Any) -> int:
        memory = planned(folder, llmload.Machine(device_memory="80GB"), **keys).memory
        assert memory is not None
        return sum(item.nbytes for item in memory.items if item.what.startswith("pinned"))

    large = tiny_checkpoint(tmp_path / "large", vocab_size=2**17, dtype=torch.bfloat16)
    assert pinned(large, device_map="cuda:0") == 3 * 2**22  # embedding and head have 4 MiB each
    assert pinned(large) == pinned(folder, device_map="cuda:0") == 0


def test_members_of_a_group_are_added_up_and_what_they_share_counts_once(folder: Path) -> None:
    policy = {"model": str(folder)}
    members = {"policy": policy, "reference": {"like": "policy", "trainable": False}}
    plans = llmload.plan_group({"models": members})
    one = planned(folder).memory
    assert one is not None
    used = one.peak("use")
    together = {peak.phase: peak for peak in plans.memory}
    assert used is not None
    assert together["use"].pages == used.pages
    trained = one.peak("train")
    assert trained is not None
    assert together["train"].host - together["use"].host == trained.host - used.host


def test_a_report_has_what_was_foretold_beside_what_was_measured(folder: Path) -> None:
    gc.collect()
    report = llmload.load({"model": str(folder), "dtype": "bfloat16"}).report
    found = report.foretold_and_measured()["host"]
    assert found.foretold == held(llmload.load({"model": str(folder), "dtype": "bfloat16"}).model)
    assert found.measured >= 0
    assert report.phases[-1].rss_mib > 0 or report.phases[-1].peak_rss_mib > 0


def test_the_command_plans_for_another_machine(folder: Path) -> None:
    asked = ["plan", str(folder), "--host-memory", "1GB", "--device-memory", "1GB", "--ranks", "2"]
    done = CliRunner().invoke(app, [*asked, "--optimizer", "sgd", "--json"])
    memory = json.loads(done.stdout)["memory"]
    assert (memory["ranks"], memory["host_memory"], memory["optimizer"]) == (2, 10**9, "sgd")
    done = CliRunner().invoke(app, asked)
    assert "every weight has been used" in done.stdout
    assert "from train on" in done.stdout


def test_what_a_plugin_takes_is_counted_and_signed(folder: Path) -> None:
    class Takes:
        name = "takes"

        @llmload.hookimpl
        def cost(self, ctx: llmload.LoadContext, forecast: Any) -> Iterator[Cost]:
            yield Cost(what="a table", nbytes=1000, phase="load", lasting=True)
            yield Cost(what="less", nbytes=10, phase="load")
            yield Cost(what="most", nbytes=70, phase="load")

    registry = llmload.create_registry([Takes])
    plain, made = planned(folder), llmload.plan({"model": str(folder)}, registry=registry)
    assert plain.memory is not None
    assert made.memory is not None
    before, after = plain.memory.phases, made.memory.phases
    extra = [b.host - a.host for a, b in zip(before, after, strict=True)]
    freed = 2 * 70  # which the allocator keeps
    assert extra == [1070 + freed, *[1000 + freed] * 3]
    assert {item.plugin for item in made.memory.items if item.what == "a table"} == {"takes"}


def test_something_else_than_a_cost_is_refused(folder: Path) -> None:
    class Wrong:
        name = "wrong"

        @llmload.hookimpl
        def cost(self, ctx: llmload.LoadContext, forecast: Any) -> list[int]:
            return [12]

    registry = llmload.create_registry([Wrong])
    made = llmload.plan({"model": str(folder)}, registry=registry)
    (problem,) = made.errors
    assert "yielded a int from cost, which may yield llmload.plugin.Cost" in problem.message


def test_advice_of_a_plugin_that_fails_is_left_out(folder: Path) -> None:
    class Fails:
        name = "fails"

        @llmload.hookimpl
        def relieve(self, ctx: llmload.LoadContext, forecast: Any) -> list[str]:
            raise ValueError

    class Helps:
        name = "helps"

        @llmload.hookimpl
        def relieve(self, ctx: llmload.LoadContext, forecast: Any) -> list[str]:
            return ["Ask somebody else."]

    registry = llmload.create_registry([Fails, Helps], block=["kbit", "zero3", "parallel"])
    spec = {"model": str(folder), "dtype": "float16"}
    made = llmload.plan(spec, registry=registry, machine=llmload.Machine(host_memory=100))
    assert [problem.fix for problem in made.errors] == ["Ask somebody else."]
