"""A lock: what exactly is loaded, written down, and every later load held to it."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import llmload
from llmload import CheckpointError, PlanError, create_registry, testing
from llmload.cli import app
from llmload.loading import lock
from llmload.loading.planning import prepare_to_load

runner = CliRunner()
FLIPS = int(os.environ.get("LLMLOAD_TEST_FLIPS", "4"))
"""Bits that are flipped, one at a time: more in ``nox -s long_trust``."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(testing.tiny_llama(tmp_path, shards=2))


def locked(spec: dict[str, Any], file: Path) -> dict[str, Any]:
    """Lock a spec, and return it with the lock."""
    registry = create_registry()
    prepared = prepare_to_load(registry.validate(spec), registry)
    lock.write(lock.make(prepared), file)
    return spec | {"lock": str(file)}


def refusals(spec: dict[str, Any]) -> list[str]:
    """Return what a plan refuses, or where it has nothing against it the load."""
    found = [problem.message for problem in llmload.plan(spec).errors]
    if not found:
        with pytest.raises(CheckpointError) as caught:
            llmload.load(spec)
        found = [problem.message for problem in caught.value.problems]
    return found


def test_a_load_of_the_same_files_goes_through(folder: Path, tmp_path: Path) -> None:
    spec = locked({"model": str(folder), "dtype": "bfloat16"}, tmp_path / "lock")
    assert llmload.load(spec).model.dtype == torch.bfloat16
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    llmload.load(spec | {"model": str(moved)})


def test_a_lock_names_every_file_that_is_opened_and_nothing_of_the_machine(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "README.md").write_text("not opened")
    spec = locked({"model": str(folder), "dropout": {"p": 0.0}}, tmp_path / "lock")
    content = json.loads(Path(spec["lock"]).read_text())
    assert sorted(content["files"]) == sorted(
        path.name for path in folder.iterdir() if path.name != "README.md"
    )
    assert content["spec"] == {"dropout": {"p": 0.0}}
    assert content["plugins"]["dropout"].startswith("llmload ")
    assert all(
        entry["size"] == (folder / name).stat().st_size for name, entry in content["files"].items()
    )


@pytest.mark.refused_late  # only the bytes of the weights tell
def test_two_equal_shaped_tensors_that_were_swapped_are_found(folder: Path, tmp_path: Path) -> None:
    spec = locked({"model": str(folder)}, tmp_path / "lock")
    shard = next(file for file in folder.glob("*.safetensors") if _swap(file))
    (message,) = refusals(spec)
    assert message.startswith(f"the file {shard.name!r} has the SHA-256 ")
    assert ", locked is " in message


def _swap(file: Path) -> bool:
    weights = load_file(file)
    names = [name for name in weights if name.endswith(("gate_proj.weight", "up_proj.weight"))]
    if len(names) < 2:
        return False
    one, other = names[:2]
    weights[one], weights[other] = weights[other], weights[one]
    save_file({name: value.contiguous() for name, value in weights.items()}, file, {"format": "pt"})
    return True


@pytest.mark.refused_late
def test_a_single_flipped_bit_of_any_weight_is_found(
    folder: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    spec = locked({"model": str(folder)}, tmp_path / "lock")
    chance, files = random.Random(0), sorted(folder.glob("*.safetensors"))
    for _ in range(FLIPS):
        file = chance.choice(files)
        whole = file.read_bytes()
        data = bytearray(whole)
        # Past the header, of which the plan tells already.
        first = 8 + int.from_bytes(data[:8], "little")
        data[chance.randrange(first, len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        (message,) = refusals(spec)
        assert message.startswith(f"the file {file.name!r} has the SHA-256 ")
        file.write_bytes(whole)
    llmload.load(spec)
    record_property("figure", f"{FLIPS} flipped bits: {FLIPS} found")


def test_a_lock_that_cannot_be_read_is_refused(folder: Path) -> None:
    (message,) = refusals({"model": str(folder), "lock": "/proc/self/mem"})
    assert message == ("the lock file cannot be read: the file cannot be read: Input/output error")


def test_what_small_files_and_the_request_tell_is_refused_by_the_plan(
    folder: Path, tmp_path: Path
) -> None:
    spec = locked({"model": str(folder)}, tmp_path / "lock")
    config = json.loads((folder / "config.json").read_text())
    kept = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(kept.replace(b'"eos_token_id": 2', b'"eos_token_id": 1'))
    assert config["eos_token_id"] == 2
    (message,) = refusals(spec)
    assert message.startswith("the file 'config.json' has the SHA-256 ")
    (folder / "config.json").write_bytes(kept + b"\n")
    assert refusals(spec) == [
        f"the file 'config.json' has {len(kept) + 1:,} bytes, locked are {len(kept):,}"
    ]
    (folder / "config.json").write_bytes(kept)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert refusals(spec) == ["the file 'chat_template.jinja' is not in the lock"]
    (folder / "chat_template.jinja").unlink()
    (folder / "generation_config.json").rename(folder / "other")
    assert refusals(spec) == ["the file 'generation_config.json' is missing"]
    (folder / "other").rename(folder / "generation_config.json")
    assert refusals(spec | {"dtype": "float16"}) == [
        "the spec's 'dtype' is float16, locked is absent"
    ]


def test_another_version_of_a_plugin_and_a_further_plugin_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    spec = locked({"model": str(folder)}, tmp_path / "lock")
    file = Path(spec["lock"])
    content = json.loads(file.read_text())
    content["plugins"] |= {"streaming": "llmload 0.0.9", "other": "somebody 1.0"}
    file.write_text(json.dumps(content))
    now = llmload.plan({"model": str(folder)}).plugins["streaming"]
    assert refusals(spec) == [
        "plugin 'other' is absent, locked is somebody 1.0",
        f"plugin 'streaming' is {now}, locked is llmload 0.0.9",
    ]


def test_files_of_an_adapter_and_of_another_tokenizer_are_locked_too(
    folder: Path, tmp_path: Path
) -> None:
    tuned = llmload.load({"model": str(folder), "lora": {"r": 2, "target_modules": ["q_proj"]}})
    tuned.model.save_pretrained(tmp_path / "adapter")
    tokenizer = testing.tiny_llama(tmp_path / "other", pad=True)
    spec = locked(
        {
            "model": str(folder),
            "lora": {"adapter": str(tmp_path / "adapter")},
            "tokenizer": {"name_or_path": str(tokenizer)},
        },
        tmp_path / "lock",
    )
    names = json.loads(Path(spec["lock"]).read_text())["files"]
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= names.keys()
    assert "tokenizer/tokenizer.json" in names
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    (message,) = refusals(spec)
    assert message.startswith("the file 'adapter/adapter_config.json' has the SHA-256 ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "this is not a lock file: Invalid JSON: EOF while parsing an object at line 1"),
        ("{}", "this is not a lock file: model: Field required"),
        (
            '{"llmload_lock": 2, "model": "m", "spec": {}, "plugins": {}, "files": {}}',
            "this is not a lock file: llmload_lock: Input should be 1",
        ),
    ],
)
def test_a_file_that_is_no_lock_is_refused(
    folder: Path, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "lock").write_text(content)
    with pytest.raises(PlanError) as caught:
        llmload.load({"model": str(folder), "lock": str(tmp_path / "lock")})
    (problem,) = caught.value.problems
    assert problem.where == "lock"
    assert problem.message.startswith(message)
    assert problem.fix == "Make one with `llmload lock`."


def test_a_lock_that_is_not_there_is_refused_by_the_plan(folder: Path, tmp_path: Path) -> None:
    (problem,) = llmload.plan({"model": str(folder), "lock": str(tmp_path / "no")}).errors
    assert problem.where == "lock"


# --- the command line -------------------------------------------------------------------------


def command(*words: object) -> Any:
    return runner.invoke(app, [str(word) for word in words])


@pytest.mark.refused_late
def test_lock_and_verify(folder: Path, tmp_path: Path) -> None:
    spec, file = tmp_path / "spec.yaml", tmp_path / "spec.lock"
    spec.write_text(f"model: {folder}\nlock: {file}\n")
    done = command("lock", spec, "-o", file)
    size = sum(path.stat().st_size for path in folder.iterdir())
    count = len(list(folder.iterdir()))
    assert (done.exit_code, done.stdout) == (0, f"{file}: {count} files, {size:,} bytes\n")
    done = command("verify", spec)
    assert (done.exit_code, done.stdout) == (0, f"{file}: all {count} files are as locked\n")
    assert command("load", spec).exit_code == 0

    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = command("verify", spec, "--json")
    assert done.exit_code == 1
    (difference,) = json.loads(done.stdout)["differences"]
    assert difference.startswith(f"the file {shard.name!r} has the SHA-256 ")
    done = command("load", spec)
    assert done.exit_code == 2
    assert "If the change is meant, make the lock anew with `llmload lock`." in done.stderr


def test_verify_without_a_lock_and_lock_of_a_group_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    spec, group = tmp_path / "spec.yaml", tmp_path / "group.yaml"
    spec.write_text(f"model: {folder}\n")
    done = command("verify", spec)
    assert (done.exit_code, done.stderr) == (
        2,
        "there is no lock to verify: the spec has no `lock`, and `--lock` was not given."
        " Make one with `llmload lock`.\n",
    )
    group.write_text(f"models: {{policy: {{model: {folder}}}}}\n")
    done = command("lock", group)
    assert (done.exit_code, done.stderr) == (
        2,
        f"'{group}' is a group of models, and this command takes one."
        " Give each member in a spec of its own; a lock is named in the member's `lock`.\n",
    )


def test_a_lock_file_is_written_whole_or_not_at_all(folder: Path, tmp_path: Path) -> None:
    registry = create_registry()
    made = lock.make(prepare_to_load(registry.validate({"model": str(folder)}), registry))
    with pytest.raises(FileNotFoundError):
        lock.write(made, tmp_path / "missing" / "lock")
    before = set(tmp_path.iterdir())
    lock.write(made, tmp_path / "lock")
    assert set(tmp_path.iterdir()) - before == {tmp_path / "lock"}
    assert lock.read(str(tmp_path / "lock")) == made
