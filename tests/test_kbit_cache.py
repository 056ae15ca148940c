"""Quantised weights that are kept: the same bits, never stale, never foreign, and bounded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised import load, unlike
from safetensors.torch import load_file, save_file
from stacks import IS_MODERN, needs_bitsandbytes
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import llmload
from llmload.checkpoint import kept
from llmload.checkpoint.kept import KeptFolders
from llmload.cli import app
from llmload.errors import RequestError
from llmload.host.registry import create_registry
from llmload.testing import tiny_checkpoint

LLAMA = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
SECTION: dict[str, Any] = {"double_quant": True}
SECTIONS = pytest.mark.parametrize(
    "section",
    [
        SECTION,
        {"quant_type": "fp4", "block_size": 128},
        {"quant_storage": "bfloat16", "compute_dtype": "float32"},
        {"bits": 8},
    ],
    ids=str,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "llama", dtype=torch.bfloat16, shards=2, **LLAMA)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def cached(section: dict[str, Any], place: Path, **others: Any) -> dict[str, Any]:
    return section | {"cache": {"folder": str(place), **others}}


def outcome(result: llmload.LoadResult) -> str:
    found: str = result.report.facts["kbit"]["cache"]["outcome"]
    return found


def entry(result: llmload.LoadResult) -> Path:
    found = result.report.facts["kbit"]["cache"]
    return Path(found["folder"]) / found["key"]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files of which every byte was hashed."""
    hashed: list[Path] = []
    real: Callable[[Path], str] = kept.of_file

    def of_file(path: Path) -> str:
        hashed.append(path)
        return real(path)

    monkeypatch.setattr(kept, "of_file", of_file)
    monkeypatch.setattr(kept, "SETTLED_NS", 0)
    return hashed


# --- the same bits --------------------------------------------------------------------------------


@needs_bitsandbytes
@SECTIONS
def test_what_is_found_is_what_was_quantised(
    section: dict[str, Any], folder: Path, place: Path
) -> None:
    plain = load(folder, section)
    first, second = (load(folder, cached(section, place)) for _ in range(2))
    assert [outcome(first), outcome(second)] == ["kept", "found"]
    assert unlike(first.model, plain.model) == []
    assert unlike(second.model, plain.model) == []
    assert "quantised_by" not in second.report.facts["kbit"]
    assert second.report.facts["kbit"]["proven_layers"] == 14


@needs_bitsandbytes
@SECTIONS
def test_transformers_reads_what_is_kept(
    section: dict[str, Any], folder: Path, place: Path
) -> None:
    result = load(folder, cached(section, place, verify=True) | {"prepare": "legacy"})
    theirs = AutoModelForCausalLM.from_pretrained(entry(result))
    ours = load(folder, section).model.state_dict()
    saved = theirs.state_dict()
    assert saved.keys() == ours.keys()
    for name, value in ours.items():
        stored = saved[name]
        if value.dtype.is_floating_point and stored.dtype == torch.uint8:
            value = value.view(torch.uint8).view(stored.shape)  # codes are kept as bytes
        assert torch.equal(stored, value), name


@needs_bitsandbytes
@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "mixtral"])
def test_other_architectures(model_type: str, tmp_path: Path, place: Path) -> None:
    """Transposed weights, biases and tied embeddings, and experts that are merged on the way."""
    folder = tiny_checkpoint(tmp_path / model_type, model_type, dtype=torch.bfloat16)
    plain = load(folder, SECTION)
    results = [load(folder, cached(SECTION, place)) for _ in range(2)]
    assert [outcome(result) for result in results] == ["kept", "found"]
    assert unlike(results[1].model, plain.model) == []


@needs_bitsandbytes
def test_preparation_casts_storage_and_compute_dtype_share_what_is_kept(
    folder: Path, place: Path
) -> None:
    load(folder, cached(SECTION, place))
    for other in (
        {"prepare": "legacy"},
        {"cast": {"norms": "float16"}},
        {"compute_dtype": "float32"},
        {"quant_storage": "bfloat16"},
    ):
        found = load(folder, cached(SECTION | other, place))
        assert outcome(found) == "found"
        assert unlike(found.model, load(folder, SECTION | other).model) == []


@needs_bitsandbytes
def test_a_cast_of_the_first_load_does_not_reach_what_is_kept(folder: Path, place: Path) -> None:
    first = load(folder, cached(SECTION | {"cast": {"norms": "float16"}}, place))
    stored = load_file(entry(first) / "model.safetensors")
    source = {n: v for file in folder.glob("*.safetensors") for n, v in load_file(file).items()}
    norm = "model.norm.weight"
    assert stored[norm].dtype == torch.bfloat16
    assert torch.equal(stored[norm], source[norm])


@needs_bitsandbytes
def test_adapter_embeddings_and_preparation_go_on_top(folder: Path, place: Path) -> None:
    others: dict[str, Any] = {
        "lora": {"r": 2, "target_modules": "all-linear"},
        "embeddings": {"pad_to_multiple_of": 16},
    }
    models = []
    for section in (SECTION, cached(SECTION, place), cached(SECTION, place)):
        torch.manual_seed(3)
        models.append(load(folder, section | {"prepare": "legacy"}, **others).model.state_dict())
    for other in models[1:]:
        assert models[0].keys() == other.keys()
        assert all(torch.equal(models[0][name], other[name]) for name in other)


@needs_bitsandbytes
def test_members_of_a_group_find_what_the_first_one_kept(folder: Path, place: Path) -> None:
    member = {"model": str(folder), "dtype": "bfloat16", "kbit": cached(SECTION, place)}
    lora = {"lora": {"r": 2, "target_modules": "all-linear"}}
    group = llmload.load_group(
        {"models": {"policy": member | lora, "judge": member | {"trainable": False}}}
    )
    outcomes = [outcome(group[name]) for name in ("policy", "judge")]
    assert outcomes == ["kept", "found"]


@needs_bitsandbytes
def test_what_is_announced_to_be_sharded_by_fsdp_is_found(
    folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folder, cached(SECTION, place))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    found = load(folder, cached(SECTION, place))
    assert outcome(found) == "found"
    assert unlike(found.model, load(folder, SECTION).model) == []
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}


@needs_bitsandbytes
def test_weights_lie_on_the_pages_of_the_cache_unless_nothing_may(
    folder: Path, place: Path
) -> None:
    load(folder, cached(SECTION, place))
    on_pages = load(folder, cached(SECTION, place))
    copied = load(folder, cached(SECTION, place), streaming={"mapped": False})
    name = "model.layers.0.mlp.up_proj.weight"
    maps = Path("/proc/self/maps").read_text().splitlines()
    kept_maps = [line.split()[0] for line in maps if str(place) in line]

    def is_mapped(model: Any) -> bool:
        address = model.get_parameter(name).data_ptr()
        spans = [[int(end, 16) for end in line.split("-")] for line in kept_maps]
        return any(start <= address < stop for start, stop in spans)

    assert is_mapped(on_pages.model)
    assert not is_mapped(copied.model)


# --- never stale ----------------------------------------------------------------------------------


def change(folder: Path, name: str = "model.layers.0.mlp.up_proj.weight") -> None:
    """Change one value in the middle of one weight, in place, and put the time stamp back."""
    for file in folder.glob("*.safetensors"):
        values = load_file(file)
        if name in values:
            state = file.stat()
            values[name].view(-1)[values[name].numel() // 2] += 1
            save_file({n: v.clone() for n, v in values.items()}, file, metadata={"format": "pt"})
            os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


@needs_bitsandbytes
def test_a_source_that_changed_is_quantised_anew(
    folder: Path, place: Path, counted: list[Path]
) -> None:
    load(folder, cached(SECTION, place))
    change(folder)
    again = load(folder, cached(SECTION, place))
    assert outcome(again) == "kept"
    assert unlike(again.model, load(folder, SECTION).model) == []
    assert len(KeptFolders(place).entries()) == 2


@needs_bitsandbytes
def test_the_same_bytes_elsewhere_find_what_is_kept(
    folder: Path, place: Path, tmp_path: Path
) -> None:
    load(folder, cached(SECTION, place))
    shutil.copytree(folder, tmp_path / "copy")
    assert outcome(load(tmp_path / "copy", cached(SECTION, place))) == "found"


@needs_bitsandbytes
def test_what_decides_on_a_bit_is_part_of_the_key(
    folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folder, cached(SECTION, place))
    for other in (
        {"double_quant": False},
        {"quant_type": "fp4"},
        {"block_size": 128},
        {"skip_modules": ["down_proj"]},
    ):
        assert outcome(load(folder, cached(SECTION | other, place))) == "kept"
    assert outcome(load(folder, cached(SECTION, place), dtype="float16")) == "kept"
    from llmload.builtin.kbit import cache

    monkeypatch.setattr(cache, "version_of", lambda name: "0.0.1")
    assert outcome(load(folder, cached(SECTION, place))) == "kept"
    monkeypatch.setattr(cache, "LAYOUT", 2)
    assert outcome(load(folder, cached(SECTION, place))) == "kept"


@needs_bitsandbytes
def test_every_byte_is_hashed_once_and_then_where_that_is_asked_for(
    folder: Path, place: Path, counted: list[Path], tmp_path: Path
) -> None:
    load(folder, cached(SECTION, place))
    counted.clear()
    load(folder, cached(SECTION, place))
    assert counted == []
    lock = {"model": str(folder), "dtype": "bfloat16", "kbit": cached(SECTION, place)}
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(lock))
    assert CliRunner().invoke(app, ["lock", str(file), "-o", str(tmp_path / "lock")]).exit_code == 0
    asked: list[dict[str, Any]] = [
        {"kbit": cached(SECTION, place, verify=True)},
        {"kbit": cached(SECTION, place), "lock": str(tmp_path / "lock")},
        {"kbit": cached(SECTION, place), "verify": {"finite": True}},
    ]
    for keys in asked:
        counted.clear()
        section = keys.pop("kbit")
        assert outcome(load(folder, section, **keys)) == "found"
        names = {path.name for path in counted}
        assert names >= {path.name for path in folder.glob("*.safetensors")}, keys
        assert "model.safetensors" in names, keys  # what is kept


@needs_bitsandbytes
def test_a_file_that_changed_a_moment_ago_is_hashed_again(folder: Path, place: Path) -> None:
    for file in folder.glob("*.safetensors"):
        os.utime(file)  # its state may not tell what comes within the same tick of the clock
    load(folder, cached(SECTION, place))
    assert not list((place / ".sources").glob("*"))


# --- never damaged or foreign ---------------------------------------------------------------------


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


@needs_bitsandbytes
@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda file: os.truncate(file, file.stat().st_size - 8),
        lambda file: file.unlink(),
        lambda file: file.with_name("more.py").write_text(""),
        lambda file: file.with_name("config.json").write_text("{}"),
    ],
    ids=["a flipped bit", "cut off", "missing", "a further file", "another config"],
)
def test_what_is_damaged_is_made_anew(
    damage: Callable[[Path], Any], folder: Path, place: Path
) -> None:
    first = load(folder, cached(SECTION, place))
    damage(entry(first) / "model.safetensors")
    again = load(folder, cached(SECTION, place))
    assert outcome(again) == "kept"
    assert unlike(again.model, first.model) == []
    assert outcome(load(folder, cached(SECTION, place))) == "found"


@needs_bitsandbytes
def test_a_folder_that_was_copied_is_held_to_its_digests(
    folder: Path, place: Path, tmp_path: Path, counted: list[Path]
) -> None:
    first = load(folder, cached(SECTION, place))
    shutil.copytree(place, tmp_path / "copied")
    (tmp_path / "copied").chmod(0o700)
    counted.clear()
    assert outcome(load(folder, cached(SECTION, tmp_path / "copied"))) == "found"
    assert tmp_path / "copied" / entry(first).name / "model.safetensors" in counted


@needs_bitsandbytes
def test_what_llmload_did_not_make_is_neither_used_nor_removed(folder: Path, place: Path) -> None:
    first = load(folder, cached(SECTION, place))
    key = entry(first).name
    shutil.rmtree(entry(first))
    (place / key).mkdir()
    (place / key / "model.safetensors").write_text("mine")
    again = load(folder, cached(SECTION, place))
    assert outcome(again) == "not kept"
    assert any(
        f"{str(place / key)!r} is there, and llmload did not make it" in line.text
        for line in again.report.lines
    )
    assert (place / key / "model.safetensors").read_text() == "mine"
    assert unlike(again.model, first.model) == []
    KeptFolders(place).clear()
    assert (place / key / "model.safetensors").exists()


@needs_bitsandbytes
def test_a_manifest_that_was_moved_to_another_key_is_not_believed(
    folder: Path, place: Path
) -> None:
    first = load(folder, cached(SECTION, place))
    other = load(folder, cached({"quant_type": "fp4"}, place))
    shutil.rmtree(entry(first))
    shutil.copytree(entry(other), entry(first))
    assert outcome(load(folder, cached(SECTION, place))) == "not kept"


@needs_bitsandbytes
def test_a_place_that_others_can_write_to_is_refused_by_the_plan(folder: Path, place: Path) -> None:
    place.mkdir()
    place.chmod(0o777)
    spec = {"model": str(folder), "dtype": "bfloat16", "kbit": cached(SECTION, place)}
    (problem,) = llmload.plan(spec).errors
    assert str(problem) == (
        f"kbit.cache.folder: others than this user can write to {str(place)!r}, and what lies there"
        " is loaded. Name a folder that is yours alone, or take their rights away with `chmod"
        " go-w`."
    )
    place.rmdir()
    place.write_text("")
    (problem,) = llmload.plan(spec).errors
    assert str(problem) == f"kbit.cache.folder: {str(place)!r} is no folder. Name another one."


@needs_bitsandbytes
def test_a_cache_that_cannot_be_written_fails_no_load(
    folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, place: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(KeptFolders, "_make_place", full)
    result = load(folder, cached(SECTION, place))
    assert outcome(result) == "not kept"
    (line,) = [line for line in result.report.lines if line.label == "cache"]
    assert line.text == "the quantised weights are not kept: No space left on device"


# --- several at once, and bounded -----------------------------------------------------------------


LOADS = """
import json, sys
import llmload

spec = json.loads(sys.argv[1])
llmload.create_registry()
print("ready", flush=True)
sys.stdin.readline()
print(llmload.load(spec).report.facts["kbit"]["cache"]["outcome"], flush=True)
"""


@needs_bitsandbytes
@pytest.mark.slow
def test_processes_that_start_at_once_leave_one_whole_folder(folder: Path, place: Path) -> None:
    section = cached(SECTION, place)
    spec = {"model": str(folder), "dtype": "bfloat16", "kbit": section}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOADS, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outcomes = set()
    for process in processes:
        with process:
            assert process.stdout is not None
            outcomes.add(process.stdout.read().splitlines()[-1])
    assert "kept" in outcomes
    assert outcomes <= {"kept", "found", "not kept"}
    assert outcome(load(folder, section)) == "found"
    assert len(KeptFolders(place).entries()) == 1
    assert not list(place.glob(".building-*"))


def test_a_folder_that_another_process_is_at_is_left_to_it(place: Path) -> None:
    key, made_from = kept.key_of({"n": 1}), {"n": 1}
    first = KeptFolders(place)

    def write(folder: Path) -> None:
        (folder / "file").write_text("of the first")
        why = KeptFolders(place).keep(key, made_from, write_second, about="", limit=10**6)
        assert why == "another process is writing it"

    def write_second(folder: Path) -> None:
        raise AssertionError(folder)

    assert first.keep(key, made_from, write, about="a file", limit=10**6) is None
    found = first.find(key)
    assert found is not None
    assert (found / "file").read_text() == "of the first"


@needs_bitsandbytes
def test_the_least_recently_used_goes(folder: Path, place: Path) -> None:
    first = load(folder, cached(SECTION, place))
    second = load(folder, cached({"quant_type": "fp4"}, place))
    for age, result in ((200, second), (100, first)):
        manifest = entry(result) / kept.MANIFEST
        os.utime(manifest, (manifest.stat().st_mtime - age,) * 2)
    assert outcome(load(folder, cached({"quant_type": "fp4"}, place))) == "found"
    size = sum(each.size for each in KeptFolders(place).entries())
    third = load(folder, cached({"block_size": 128}, place, max_gb=1.05 * size / 10**9))
    assert {each.key for each in KeptFolders(place).entries()} == {
        entry(second).name,
        entry(third).name,
    }


@needs_bitsandbytes
def test_what_is_larger_than_the_bound_is_not_kept(folder: Path, place: Path) -> None:
    result = load(folder, cached(SECTION, place, max_gb=1e-6))
    (line,) = [line for line in result.report.lines if line.label == "cache"]
    assert line.text.startswith("the quantised weights are not kept: it has ")
    assert line.text.endswith(" bytes, of 1,000 allowed for all")
    assert KeptFolders(place).entries() == []


@needs_bitsandbytes
def test_a_killed_writer_leaves_nothing_that_stays(folder: Path, place: Path) -> None:
    first = load(folder, cached(SECTION, place))
    left = place / f".building-{entry(first).name}-1"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    assert outcome(load(folder, cached(SECTION, place))) == "found"
    shutil.rmtree(entry(first))
    assert outcome(load(folder, cached(SECTION, place))) == "kept"
    assert not left.exists()


# --- what is refused ------------------------------------------------------------------------------


@needs_bitsandbytes
def test_a_quantised_checkpoint_has_nothing_to_keep(folder: Path, place: Path) -> None:
    quantised = entry(load(folder, cached(SECTION, place)))
    (problem,) = llmload.plan({"model": str(quantised), "kbit": {"cache": {}}}).errors
    assert str(problem) == (
        "kbit.cache: the checkpoint is quantised already, so there is nothing to keep."
        " Remove `cache`."
    )


@needs_bitsandbytes
def test_a_model_that_from_pretrained_spreads_is_not_kept(folder: Path, place: Path) -> None:
    spec = {"model": str(folder), "device_map": "auto", "kbit": cached(SECTION, place)}
    assert [str(problem) for problem in llmload.plan(spec).errors] == [
        "kbit.cache: from_pretrained quantises this model, and keeps nothing. Remove `cache`, or"
        " leave `device_map` out."
    ]


@pytest.mark.skipif(IS_MODERN, reason="the other stack quantises weight by weight")
def test_an_older_transformers_keeps_nothing(folder: Path, place: Path) -> None:
    spec = {"model": str(folder), "dtype": "bfloat16", "kbit": cached(SECTION, place)}
    assert (
        "kbit.cache: from_pretrained quantises this model, and keeps nothing. Remove `cache`, or"
        " use transformers 5."
    ) in [str(problem) for problem in llmload.plan(spec).errors]


@needs_bitsandbytes
def test_another_loader_says_that_nothing_is_kept(folder: Path, place: Path) -> None:
    registry = create_registry(block={"streaming"})
    result = load(folder, cached(SECTION, place), registry=registry)
    assert outcome(result) == "not kept"
    (line,) = [line for line in result.report.lines if line.label == "cache"]
    assert line.text == (
        "the quantised weights are not kept: the streaming loader did not load the model"
    )


# --- the command ----------------------------------------------------------------------------------


@needs_bitsandbytes
def test_the_command_lists_and_clears(folder: Path, place: Path) -> None:
    keys = [entry(load(folder, cached({"bits": bits}, place))).name for bits in (4, 8)]

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, ["cache", *words, "--dir", str(place)])

    listed = json.loads(run("list", "--json").stdout)
    assert [each["key"] for each in listed["folders"]] == keys[::-1]
    assert [each["about"] for each in listed["folders"]] == [
        f"{folder}, 8 bits",
        f"{folder}, 4 bits",
    ]
    shown = run("list").stdout
    assert all(key in shown for key in keys)
    assert f"2 in {place}".replace("\n", "") in shown.replace("\n", "")
    assert "removed: 1 in" in run("clear", keys[0][:12]).stdout
    assert [each.key for each in KeptFolders(place).entries()] == keys[1:]
    assert run("clear").exit_code == 0
    assert run("list").stdout.startswith("0 in ")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lst"], "the action 'lst' is none. Did you mean 'list'?"),
        (["x"], "the action 'x' is none. Write `llmload cache list` or `llmload cache clear`."),
        (["list", "abc"], "`list` takes no keys. Leave them out."),
        (["clear", "abc"], "nothing is kept under 'abc' in {place!r}. See `llmload cache list`."),
    ],
)
def test_the_command_refuses_what_it_does_not_know(
    words: list[str], message: str, place: Path
) -> None:
    done = CliRunner().invoke(app, ["cache", *words, "--dir", str(place)])
    assert done.exit_code == 2
    assert message.format(place=str(place)) in done.stderr


def test_the_usual_place_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept.usual_place() == tmp_path / "llmload/kept"


def test_a_place_that_cannot_be_looked_into_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError) as caught:
        KeptFolders(tmp_path / "file" / "below")
    assert "cannot be looked into: Not a directory. Name another folder." in str(caught.value)
