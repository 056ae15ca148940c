"""How far `device_map: auto` may go: `max_memory` spreads a model as transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from sameness import differences, from_pretrained
from stacks import needs_transformers_5
from transformers import AutoModelForCausalLM

import llmload
from llmload.testing import save_checkpoint, tiny_checkpoint, tiny_model

ELSEWHERE = llmload.Machine(device_memory="80GB", host_memory="100GB")
here = pytest.mark.skipif(torch.cuda.is_available(), reason="there are devices here")


class _FoundError(Exception):
    pass


def spread_by_from_pretrained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> dict[str, Any]:
    """Return the device map that ``from_pretrained`` makes, before it asks devices for memory."""
    theirs = transformers.modeling_utils._get_device_map

    def found(*arguments: Any) -> Any:
        raise _FoundError(theirs(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "_get_device_map", found)
        with pytest.raises(_FoundError) as stopped:
            from_pretrained(AutoModelForCausalLM, folder, **options)
    device_map: dict[str, Any] = stopped.value.args[0]
    return device_map


def refusal(folder: Path, **keys: Any) -> str:
    with pytest.raises(llmload.RequestError) as caught:
        llmload.load({"model": str(folder), **keys})
    return str(caught.value)


@pytest.mark.parametrize(
    ("device_map", "tied"),
    [("auto", False), ("auto", True), ("balanced_low_0", True), ("sequential", False)],
)
@pytest.mark.parametrize(
    "amounts",
    [
        {"0": "1GB", "cpu": "1GB"},
        {"0": "12KB", "1": "0.02MB", "cpu": "1GiB"},
        {"0": 0, "1": "1MiB"},
        {"0": "9KiB", "1": "9KiB", "2": "9KiB", "cpu": "100KB"},
    ],
)
def test_modules_are_spread_as_from_pretrained_spreads_them(
    device_map: str,
    tied: bool,
    amounts: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(num_hidden_layers=4, tie_word_embeddings=tied)
    folder = save_checkpoint(model, tmp_path / "m")
    plan = llmload.plan(
        {"model": str(folder), "device_map": device_map, "max_memory": amounts}, machine=ELSEWHERE
    )
    most = {int(key) if key.isdigit() else key: amount for key, amount in amounts.items()}
    theirs = spread_by_from_pretrained(folder, monkeypatch, device_map=device_map, max_memory=most)
    assert plan.device_map == theirs
    assert bool(plan.errors) == ("disk" in theirs.values())


@here
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("loader", ["streaming", "transformers"])
def test_a_model_within_the_memory_of_the_cpu_is_what_from_pretrained_makes(
    dtype: str, loader: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    spec = {
        "model": str(folder), "dtype": dtype, "device_map": "auto", "max_memory": {"cpu": "1GB"},
    }  # fmt: skip
    select = [] if loader == "streaming" else ["no:streaming"]
    result = llmload.load(spec, registry=llmload.create_registry(select=select))
    assert (result.report.loader, result.plan.device_map) == (loader, {"": "cpu"})
    assert "on cpu      the whole model" in str(result.plan)
    most = {"cpu": "1GB"}
    theirs = from_pretrained(
        AutoModelForCausalLM, folder, dtype, device_map="auto", max_memory=most
    )
    assert differences(result.model, theirs) == []


@needs_transformers_5
@here
def test_a_quantised_model_is_spread_by_from_pretrained_within_the_memory(tmp_path: Path) -> None:
    spec = {"model": str(tiny_checkpoint(tmp_path / "m")), "device_map": "auto", "kbit": {}}
    result = llmload.load({**spec, "max_memory": {"cpu": "1GB"}})
    assert (result.report.loader, result.plan.device_map) == ("transformers", {})
    assert {parameter.device.type for parameter in result.model.parameters()} == {"cpu"}


@needs_transformers_5
@here
@pytest.mark.refused_late  # what quantised weights take, transformers weighs in the load
def test_a_quantised_model_beyond_the_memory_is_refused_by_from_pretrained(tmp_path: Path) -> None:
    spec = {"model": str(tiny_checkpoint(tmp_path / "m")), "device_map": "auto", "kbit": {}}
    with pytest.raises(llmload.CheckpointError, match="on the CPU or the disk"):
        llmload.load({**spec, "max_memory": {"cpu": 100}})


@here
def test_too_little_memory_is_refused_by_the_plan(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    assert refusal(folder, device_map="auto", max_memory={"cpu": "20KB"}) == (
        "max_memory: 'auto' leaves modules without a device: what `max_memory` gives is too little"
        " for the model, and weights are not kept on a disk. Give more, quantise with `kbit`,"
        " partition with `zero3`, or take a smaller model."
    )


def test_a_machine_with_too_little_memory_is_refused_by_the_plan(tmp_path: Path) -> None:
    spec = {"model": str(tiny_checkpoint(tmp_path / "m")), "device_map": "auto"}
    machine = llmload.Machine(device_memory="10KB", host_memory="10KB")
    (problem, *_) = llmload.plan(spec, machine=machine).errors
    assert str(problem) == (
        "device_map: 'auto' leaves modules without a device: the memory of all of them is too"
        " little for the model, and weights are not kept on a disk. Quantise with `kbit`, partition"
        " with `zero3`, or take a smaller model."
    )


@here
def test_a_device_that_is_not_there_is_refused_by_the_plan(tmp_path: Path) -> None:
    most = {"1": "1GB", "mps": "1GB", "cpu": "1GB"}
    assert refusal(tiny_checkpoint(tmp_path / "m"), device_map="auto", max_memory=most) == (
        "max_memory.1: there is no device 1: of kind 'accelerator' there are none here. Name one"
        " that is here, or remove the key.\n"
        "max_memory.mps: there is no device 'mps': of kind 'mps' there are none here. Name one"
        " that is here, or remove the key."
    )


def test_the_plan_says_what_is_where_and_foretells_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save_checkpoint(tiny_model(num_hidden_layers=4), tmp_path / "m")
    whole = llmload.plan({"model": str(folder)}).parameter_bytes
    capfd.readouterr()
    plan = llmload.plan(
        {"model": str(folder), "device_map": "auto", "max_memory": {"0": "30KB", "cpu": "1GB"},
         "lora": {"target_modules": ["q_proj"]}},
        machine=ELSEWHERE,
    )  # fmt: skip
    assert capfd.readouterr().err == ""  # accelerate would say that the device is not here
    places = {*plan.device_map.values()}
    assert places == {0, "cpu"}
    lines = [line.split(maxsplit=2) for line in str(plan).splitlines()]
    assert {line[1] for line in lines if line[:1] == ["on"]} == {"0", "cpu"}
    assert plan.memory is not None
    loaded, trained = plan.memory.peak("load"), plan.memory.peak("train")
    assert loaded is not None
    assert trained is not None
    # What is on the CPU stays there, as hooks bring it over for each use.
    assert 0 < loaded.device <= 30_000
    on_host = {route.route for route in plan.memory.routes if route.route == "mapped"}
    assert on_host == {"mapped"}
    base = sum(route.kept_bytes for route in plan.memory.routes if route.route != "new")
    assert base == whole
    assert trained.device < whole


def test_accelerators_are_counted_together(tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_model(num_hidden_layers=8), tmp_path / "m")
    machine = llmload.Machine(device_memory="40KB", host_memory="1GB", optimizer="none")
    spec = {"model": str(folder), "device_map": "auto"}
    alone = llmload.plan({"model": str(folder), "device_map": "cuda:0"}, machine=machine)
    assert "takes" in str(alone.errors[0])
    three = {"0": "40KB", "1": "40KB", "2": "40KB"}
    assert llmload.plan({**spec, "max_memory": three}, machine=machine).errors == []
