"""Snapshots in the hub's cache, of which other tools fetched what they needed. No hub is asked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import llmload
from llmload.testing import tiny_llama

COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNNEEDED = ("LICENSE.txt", "consolidated.safetensors", "original/params.json", "README.md")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that holds ``org/name`` as ``from_pretrained`` leaves it."""
    repository = tmp_path / "hub" / "models--org--name"
    shutil.copytree(tiny_llama(tmp_path, shards=2), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path / "hub"


def listed(cache: Path, *more: str) -> None:
    """Leave the listing of the repository that ``snapshot_download`` keeps beside the snapshot."""
    tree = pytest.importorskip("huggingface_hub._tree_cache")
    repository = cache / "models--org--name"
    names = [path.name for path in (repository / "snapshots" / COMMIT).iterdir()]
    entries = {n: tree.TreeCacheEntry(size=1, blob_id="0" * 40) for n in (*names, *more)}
    tree.write_tree_cache(str(repository), COMMIT, entries)


def spec(cache: Path, **keys: Any) -> dict[str, Any]:
    return {"model": "org/name", "cache_dir": str(cache), "local_files_only": True, **keys}


def refusal(cache: Path, **keys: Any) -> str:
    with pytest.raises(llmload.CheckpointError) as caught:
        llmload.load(spec(cache, **keys))
    return str(caught.value)


@pytest.mark.parametrize("keys", [{}, {"revision": COMMIT}, {"allow_pickle": True}])
def test_what_no_load_needs_may_be_missing(keys: dict[str, Any], cache: Path) -> None:
    listed(cache, *UNNEEDED)
    assert llmload.plan(spec(cache, **keys)).errors == []
    result = llmload.load(spec(cache, **keys))
    assert result.report.loader == "streaming"
    assert result.tokenizer is not None


def test_an_id_of_one_word_is_found_in_the_cache(cache: Path, tmp_path: Path) -> None:
    (cache / "models--org--name").rename(cache / "models--gpt2")
    result = llmload.load(spec(cache, model="gpt2"))
    assert result.report.loader == "streaming"
    with_tokenizer = {"model": str(tiny_llama(tmp_path / "other")), "cache_dir": str(cache)}
    tokenizer = {"name_or_path": "gpt2"}
    keys = {"local_files_only": True, "tokenizer": tokenizer}
    assert llmload.load(with_tokenizer | keys).tokenizer.get_vocab() == result.tokenizer.get_vocab()


def test_a_folder_goes_before_an_id_of_one_word(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "models--org--name").rename(cache / "models--gpt2")
    tiny_llama(tmp_path / "other").rename(tmp_path / "gpt2")
    (cache / "models--gpt2" / "snapshots" / COMMIT / "config.json").unlink()
    monkeypatch.chdir(tmp_path)
    llmload.load(spec(cache, model="gpt2"))


def test_files_that_the_listing_calls_configs_may_be_missing_too(cache: Path) -> None:
    listed(cache, "trainer_state.json", "tokenizer.original.model")
    llmload.load(spec(cache))


def test_trusted_code_that_is_missing_does_not_matter_where_none_is_used(cache: Path) -> None:
    listed(cache, "modeling_own.py")
    llmload.load(spec(cache, trust_remote_code=True))


def test_a_missing_shard_is_called_by_its_name(cache: Path) -> None:
    snapshot = cache / "models--org--name" / "snapshots" / COMMIT
    shard = sorted(snapshot.glob("*.safetensors"))[0]
    listed(cache)
    shard.unlink()
    assert refusal(cache) == (f"{shard}: the file is missing. Download or save the folder again.")


def test_a_snapshot_without_weights_says_how_to_fetch_them(cache: Path) -> None:
    snapshot = cache / "models--org--name" / "snapshots" / COMMIT
    for file in snapshot.glob("model*"):
        file.unlink()
    assert refusal(cache).endswith(". Fetch the weights with `hf download org/name`.")


def test_a_missing_revision_is_told_with_those_that_are_there(cache: Path) -> None:
    assert refusal(cache, revision="v2") == (
        f"model: the cache {str(cache)!r} holds 'org/name' at main, {COMMIT}, not at the revision"
        " 'v2', which could not be fetched (`local_files_only` is set). Write `revision` with one"
        " of those, or fetch it with `hf download org/name --revision v2`."
    )


def test_the_model_may_lie_in_a_folder_of_the_repository(cache: Path) -> None:
    snapshot = cache / "models--org--name" / "snapshots" / COMMIT
    inner = snapshot / "actor"
    inner.mkdir()
    for file in [path for path in snapshot.iterdir() if path.is_file()]:
        file.rename(inner / file.name)
    assert llmload.load(spec(cache, subfolder="actor")).report.loader == "streaming"
