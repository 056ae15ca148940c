"""The plugin ``npy_folder``: loads what ``from_pretrained`` does, and refuses before it reads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llmload
from llmload.plugin import installed_transformers
from llmload.testing import assert_plugin, losses, parameters, same
from llmload_npy_folder import layout
from llmload_npy_folder.plugin import NpyFolder

Make = Callable[..., Path]


def converted(source: Path, target: Path) -> Path:
    """Copy a model's folder, its weights in this layout."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, torch.Tensor] = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    layout.save(tensors, target / "weights")
    return target


def from_pretrained(folder: Path, dtype: torch.dtype) -> Any:
    options = installed_transformers().dtype_option(dtype)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def source(llmload_checkpoint: Make) -> Path:
    return llmload_checkpoint("llama", shards=2)


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return converted(source, tmp_path / "npy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as stored", "cast"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_every_parameter_is_the_one_of_from_pretrained(
    llmload_checkpoint: Make, tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    source = llmload_checkpoint(model_type)
    folder = converted(source, tmp_path / "npy")
    name = str(dtype).removeprefix("torch.")
    result = llmload.load({"model": str(folder), "dtype": name, "npy_folder": {}})
    assert result.report.loader == "streaming"
    assert result.report.newly_initialised == {}
    mine, theirs = parameters(result.model), parameters(from_pretrained(source, dtype))
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not same(mine[name], theirs[name])] == []


@pytest.mark.parametrize("loader", ["streaming", "transformers"])
def test_each_loader_of_llmload_takes_the_layout(folder: Path, source: Path, loader: str) -> None:
    block = {"streaming"} - {loader}
    registry = llmload.create_registry(block=block)
    result = llmload.load({"model": str(folder), "npy_folder": {}}, registry=registry)
    assert result.report.loader == loader
    mine, theirs = parameters(result.model), parameters(from_pretrained(source, torch.float32))
    assert all(same(mine[name], theirs[name]) for name in theirs)


def test_each_tensor_is_read_once_and_stays_on_its_files_pages(folder: Path) -> None:
    facts = llmload.load({"model": str(folder), "npy_folder": {}}).report.facts["streaming"]
    assert len(facts["files"]) == facts["mapped"] == 21
    assert facts["copied"] == 0
    assert all(file["bytes_read"] == file["tensor_bytes"] for file in facts["files"].values())


def test_bfloat16_is_kept_though_numpy_has_no_such_dtype(
    llmload_checkpoint: Make, tmp_path: Path
) -> None:
    source = llmload_checkpoint("llama", dtype=torch.bfloat16)
    folder = converted(source, tmp_path / "npy")
    model = llmload.load({"model": str(folder), "npy_folder": {}}).model
    assert model.dtype == torch.bfloat16
    theirs = parameters(from_pretrained(source, torch.bfloat16))
    assert all(same(tensor, theirs[name]) for name, tensor in parameters(model).items())


def test_an_adapter_is_trained_on_such_weights(folder: Path) -> None:
    spec = {"model": str(folder), "npy_folder": {}, "lora": {"r": 4}, "dtype": "bfloat16"}
    model = llmload.load(spec).model
    first, *_, last = losses(model, 5)
    assert last < first


def test_the_files_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "weights", tmp_path / "elsewhere" / "tensors")
    spec = {"model": str(folder), "weights_from": str(tmp_path / "elsewhere")}
    plan = llmload.plan({**spec, "npy_folder": {"folder": "tensors"}})
    assert not plan.errors
    (note,) = (note for step in plan.steps for note in step.notes if step.plugin == "npy_folder")
    assert note == f"the weights are 21 files in {tmp_path / 'elsewhere' / 'tensors'}"


def errors_of(folder: Path) -> list[str]:
    """What the plan says, or refuses with."""
    try:
        return [str(problem) for problem in llmload.plan(_spec(folder)).errors]
    except llmload.RequestError as error:
        return [str(problem) for problem in error.problems]


def _spec(folder: Path) -> dict[str, Any]:
    return {"model": str(folder), "npy_folder": {}}


NORM = "model.norm.weight"


def test_a_tensor_that_is_missing_is_refused_before_any_is_read(folder: Path) -> None:
    (folder / "weights" / f"{NORM}.npy").unlink()
    (error,) = errors_of(folder)
    assert f"the checkpoint has no values for '{NORM}'" in error


def test_a_tensor_that_is_one_too_many_is_refused_before_any_is_read(folder: Path) -> None:
    numpy.save(folder / "weights" / "model.extra.npy", numpy.zeros(3, "f4"))
    (error,) = errors_of(folder)
    assert "the model has no place for 'model.extra' of the checkpoint" in error


def test_a_tensor_of_another_shape_is_refused_before_any_is_read(folder: Path) -> None:
    numpy.save(folder / "weights" / f"{NORM}.npy", numpy.zeros(3, "f4"))
    (error,) = errors_of(folder)
    assert "float32 (3,)" in error


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "big endian": (
        lambda path: numpy.save(path, numpy.zeros(64, ">f4")),
        "its values are '>f4', of which a model takes <f2, <f4, <f8, <i2, <i4, <i8, |V2, |b1, |i1,"
        " |u1",
    ),
    "objects": (
        lambda path: numpy.save(path, numpy.array([{}]), allow_pickle=True),
        "its values are '|O'",
    ),
    "column by column": (
        lambda path: numpy.save(path, numpy.zeros((8, 8), "f4", order="F")),
        "it is stored column by column (fortran_order)",
    ),
    "cut off": (
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        "its header asks for 192 bytes, and it has 188",
    ),
    "too long": (
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        "its header asks for 192 bytes, and it has 193",
    ),
    "not of NumPy": (
        lambda path: path.write_bytes(b"no header"),
        "this is no .npy file: the magic",
    ),
    "empty": (lambda path: path.write_bytes(b""), "this is no .npy file: EOF"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_cannot_be_read_is_named(folder: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    path = folder / "weights" / f"{NORM}.npy"
    damage(path)
    (error,) = errors_of(folder)
    assert error.startswith(f"{path}: {message}")
    assert error.endswith(
        "Save it again with numpy.save, from a C-contiguous array of such values."
    )


def test_a_link_that_leads_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    path = folder / "weights" / f"{NORM}.npy"
    path.rename(tmp_path / "outside.npy")
    path.symlink_to(tmp_path / "outside.npy")
    (error,) = errors_of(folder)
    assert "a link leads out of the model folder" in error


def test_a_folder_that_is_not_there_or_empty_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "weights")
    (error,) = errors_of(folder)
    assert error == (
        f"npy_folder.folder: there is no folder {str(folder / 'weights')!r}. Name the one that"
        " holds the files of the tensors."
    )
    (folder / "weights").mkdir()
    (error,) = errors_of(folder)
    assert f"the folder {str(folder / 'weights')!r} holds no .npy file" in error


def test_random_weights_and_files_of_them_cannot_both_be_asked_for(folder: Path) -> None:
    plan = llmload.plan({**_spec(folder), "weights": "random"})
    (error,) = plan.errors
    assert error.message == (
        "'npy_folder' cannot be combined with 'weights': no file is read for random weights"
    )


@pytest.mark.slow
def test_the_plugin_keeps_the_contract(source: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"  # it is loaded without the plugin too
    shutil.copytree(source, both)
    shutil.copytree(converted(source, tmp_path / "npy") / "weights", both / "weights")
    assert_plugin(NpyFolder, spec={"npy_folder": {}}, bad=[{"folder": "nowhere"}], folder=both)
