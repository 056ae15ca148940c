"""Where the model comes from: folders, hub snapshots, cache candidates; and no code from a config.

No hub can be reached here: ``snapshot_download`` is replaced by a stand-in wherever one is asked.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from llmload import LoadSpec
from llmload.checkpoint.untrusted import UntrustedFolder
from llmload.errors import CheckpointError
from llmload.hf import locating
from llmload.hf.hub import cache_dir
from llmload.testing import tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source"))


def refusal(spec: LoadSpec) -> str:
    with pytest.raises(CheckpointError) as caught:
        locating.resolve(spec, weights=True)
    return str(caught.value)


# --- folders ------------------------------------------------------------------------------------


def test_a_folder_is_taken_as_it_is(folder: Path) -> None:
    assert locating.resolve(LoadSpec(model=folder), weights=True) == folder


def test_a_subfolder_is_part_of_the_place(folder: Path) -> None:
    spec = LoadSpec(model=folder.parent, subfolder=folder.name)
    assert locating.resolve(spec, weights=True) == folder


def test_a_folder_that_does_not_exist_is_refused() -> None:
    assert refusal(LoadSpec(model="./no/such/folder")) == (
        "model: the folder './no/such/folder' does not exist. Give a folder written by"
        " save_pretrained, or a hub id such as `org/name`."
    )


def test_a_single_word_that_is_no_folder_is_looked_for_on_the_hub() -> None:
    assert refusal(LoadSpec(model="gtp2", local_files_only=True)).startswith(
        "model: 'gtp2' is not a folder, and the hub repository of that name is neither in the cache"
    )


@pytest.mark.parametrize("model", ["no such", "a/b/c", "./gpt2", "~/gpt2", "name.git", "a--b"])
def test_what_is_no_hub_id_is_a_folder_that_does_not_exist(model: str) -> None:
    assert f"{model!r} does not exist" in refusal(LoadSpec(model=model))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert refusal(LoadSpec(model=tmp_path)) == (
        f"model: the folder {str(tmp_path)!r} holds no config.json. Give a folder written by"
        " save_pretrained."
    )


def test_a_revision_of_a_folder_is_refused(folder: Path) -> None:
    assert refusal(LoadSpec(model=folder, revision="main")) == (
        f"revision: revision 'main' was asked for, but {str(folder)!r} is a local folder, which"
        " has none. Remove `revision`, or give the id of a hub repository."
    )


# --- the hub ------------------------------------------------------------------------------------


OTHERS = (
    "LICENSE.txt",
    "README.md",
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "original/params.json",
    "original/consolidated.00.pth",
    "onnx/model.onnx",
    "onnx/config.json",
    "checkpoint-5/model.safetensors",
    "checkpoint-5/config.json",
    "pytorch_model.bin",
    "tf_model.h5",
    "modeling_own.py",
)
"""What lies in repositories beside what a load needs."""


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A stand-in for the hub: loads from a folder, and returns the files fetched of it."""

    def fetch(remote: Path, *, weights: bool = True, **keys: Any) -> list[str]:
        for name in OTHERS:
            path = remote / keys.get("subfolder", "") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        here = tmp_path / "snapshot"
        here.mkdir()

        def snapshot_download(repo: str, **options: Any) -> str:
            assert (repo, options["revision"]) == ("org/name", keys.get("revision"))
            names = [str(p.relative_to(remote)) for p in remote.rglob("*") if p.is_file()]
            patterns = {key: options[key] for key in ("allow_patterns", "ignore_patterns")}
            for name in filter_repo_objects(names, **patterns):
                (here / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(remote / name, here / name)
            return str(here)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        locating.resolve(LoadSpec(model="org/name", **keys), weights=weights)
        return sorted(str(p.relative_to(here)) for p in here.rglob("*") if p.is_file())

    return fetch


METADATA = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
"""What every load fetches; 4.51.3 saves one file more."""


def test_just_what_is_needed_is_fetched_at_the_revision(
    tmp_path: Path, fetched: Callable[..., list[str]]
) -> None:
    remote = tiny_checkpoint(tmp_path / "remote", shards=2)
    shards = {path.name for path in remote.glob("model*")}
    assert len(shards) > 2  # with the index
    found = set(fetched(remote, revision="v2")) - {"special_tokens_map.json"}
    assert found == METADATA | shards


def test_a_single_file_is_fetched_where_there_is_no_index(
    tmp_path: Path, fetched: Callable[..., list[str]]
) -> None:
    found = fetched(tiny_checkpoint(tmp_path / "remote"))
    assert set(found) - {"special_tokens_map.json"} == METADATA | {"model.safetensors"}


def test_for_a_plan_no_weight_file_is_fetched(
    tmp_path: Path, fetched: Callable[..., list[str]]
) -> None:
    found = fetched(tiny_checkpoint(tmp_path / "remote"), weights=False)
    assert set(found) - {"special_tokens_map.json"} == METADATA


def test_pickles_are_fetched_where_they_are_allowed_and_all_there_is(
    tmp_path: Path, fetched: Callable[..., list[str]]
) -> None:
    remote = tiny_checkpoint(tmp_path / "remote")
    (remote / "model.safetensors").unlink()
    assert "pytorch_model.bin" in fetched(remote, allow_pickle=True)


def test_a_pickle_beside_safetensors_is_not_fetched(
    tmp_path: Path, fetched: Callable[..., list[str]]
) -> None:
    assert "pytorch_model.bin" not in fetched(
        tiny_checkpoint(tmp_path / "remote"), allow_pickle=True
    )


def test_code_is_fetched_where_it_is_trusted(
    tmp_path: Path, fetched: Callable[..., list[str]]
) -> None:
    remote = tiny_checkpoint(tmp_path / "remote")
    assert "modeling_own.py" in fetched(remote, trust_remote_code=True)


def test_of_a_folder_in_the_repository_the_same_is_fetched(
    tmp_path: Path, fetched: Callable[..., list[str]]
) -> None:
    tiny_checkpoint(tmp_path / "remote" / "actor", shards=2)
    found = fetched(tmp_path / "remote", subfolder="actor")
    assert {name for name in found if not name.startswith("actor/")} == set()
    names = {name.removeprefix("actor/") for name in found} - {"special_tokens_map.json"}
    assert names >= METADATA
    assert not names & set(OTHERS)


def test_a_hub_id_that_cannot_be_fetched_is_refused(tmp_path: Path) -> None:
    message = refusal(LoadSpec(model="org/name", cache_dir=tmp_path, local_files_only=True))
    assert message == (
        "model: 'org/name' is not a folder, and the hub repository of that name is neither in the"
        " cache nor could it be fetched (`local_files_only` is set). Give a local folder, or fetch"
        " it beforehand with `hf download`."
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            "GatedRepoError",
            "model: the hub repository 'org/name' is gated. Ask for access on the model's page,"
            " then log in with `hf auth login`.",
        ),
        (
            "RevisionNotFoundError",
            "model: the hub repository 'org/name' has no revision None. Give a branch, tag or"
            " commit of the repository.",
        ),
        (
            "RepositoryNotFoundError",
            "model: neither a folder nor a hub repository is called 'org/name'. Check the id, or"
            " log in with `hf auth login` if it is private.",
        ),
    ],
)
def test_what_the_hub_refuses_is_said_in_our_words(
    error: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import errors

    kind = getattr(errors, error)

    def refuse(*args: Any, **options: Any) -> None:
        raise kind.__new__(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert refusal(LoadSpec(model="org/name")) == message


def test_the_first_cache_candidate_that_exists_wins(tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    (tmp_path / "third").mkdir()
    names = [str(tmp_path / name) for name in ("first", "second", "third")]
    assert cache_dir(LoadSpec(model="m", cache_dir=names)) == tmp_path / "second"


def test_the_last_cache_candidate_is_taken_where_none_exists(tmp_path: Path) -> None:
    names = [str(tmp_path / "first"), str(tmp_path / "second")]
    assert cache_dir(LoadSpec(model="m", cache_dir=names)) == tmp_path / "second"
    assert cache_dir(LoadSpec(model="m")) is None


# --- configs ------------------------------------------------------------------------------------

HOSTILE: list[tuple[str, dict[str, Any], str]] = [
    (key, content, path)
    for key, content, path in (
        ("attention", {"attn_implementation": "evil/kernel"}, "attn_implementation"),
        ("private attention", {"_attn_implementation": "evil/kernel"}, "_attn_implementation"),
        (
            "internal attention",
            {"_attn_implementation_internal": "evil/kernel"},
            "_attn_implementation_internal",
        ),
        (
            "internal experts",
            {"_experts_implementation_internal": "x"},
            "_experts_implementation_internal",
        ),
        ("experts", {"experts_implementation": "evil/kernel"}, "experts_implementation"),
        ("trust", {"trust_remote_code": True}, "trust_remote_code"),
        ("nested", {"text_config": {"trust_remote_code": True}}, "text_config.trust_remote_code"),
        (
            "in a list",
            {"parts": [{}, {"_attn_implementation_internal": "a/b"}]},
            "parts.1._attn_implementation_internal",
        ),
    )
]


@pytest.mark.parametrize(("name", "content", "path"), HOSTILE, ids=[row[0] for row in HOSTILE])
def test_a_config_that_leads_to_code_is_refused_by_the_key(
    tmp_path: Path, name: str, content: dict[str, Any], path: str
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", **content}))
    with pytest.raises(CheckpointError) as caught:
        locating.read_config(UntrustedFolder(tmp_path), LoadSpec(model=tmp_path))
    (problem,) = caught.value.problems
    assert (problem.where, problem.file) == (path, str(file))
    assert problem.message.startswith(f"the config sets {path!r} to ")
    assert problem.fix == (
        "Remove the key from the config, or set `trust_remote_code: true` if you trust whoever made"
        " the folder."
    )
    assert locating.read_config(
        UntrustedFolder(tmp_path), LoadSpec(model=tmp_path, trust_remote_code=True)
    )


def test_ordinary_kernels_and_a_refusal_of_remote_code_pass(tmp_path: Path) -> None:
    content = {"model_type": "llama", "attn_implementation": "sdpa", "trust_remote_code": False}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert locating.read_config(UntrustedFolder(tmp_path), LoadSpec(model=tmp_path)) == content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the config is not valid JSON: Expecting property name enclosed in double quotes"),
        ("[]", "the config is a JSON list, not an object"),
    ],
)
def test_an_unreadable_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        locating.read_config(UntrustedFolder(tmp_path), LoadSpec(model=tmp_path))
    assert message in str(caught.value)
