"""What a model folder can do to whoever loads it: be refused in words, or nothing.

Python's audit hook watches: no file outside the folder is opened, no weight is mapped, nothing is
unpickled, imported from the folder, started or connected to.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from corpus import IMMUNE, WEIGHTS, Row, canary, rows
from published import harm, spec_of
from stacks import IS_MODERN
from watching import watching

import llmload
from llmload.errors import CheckpointError, Problem, RequestError

ROWS = list(rows())
VALIDATED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    WEIGHTS,
}
LONGEST_MESSAGE = 30_000
IGNORED_BY_4_51 = {
    "config dtype exec",
    "config dtype Tensor",
    "config dtype int8",
    "config dtype 5",
    "config rope_parameters {'rope_type': 'nope'}",
    "config attn_implementation 5",
    "config layer_types [5]",
}
"""Keys of later versions, which transformers 4.51.3 does not read: they do no harm there."""
NOT_ALLOCATED_IN_4_51 = {"vocabulary", "heads", "drawn"}
"""4.51.3 builds buffers for real, so that the memory they would take is refused first."""


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_hostile_folder_is_refused_in_words_or_does_no_harm(
    row: Row, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    row.damage(folder)
    spec = spec_of(row, folder)
    if not IS_MODERN and row.name in IGNORED_BY_4_51:
        row = row._replace(says=IMMUNE)
    if not IS_MODERN and row.name in NOT_ALLOCATED_IN_4_51:
        row = row._replace(says="cannot be built from the config")
    with watching(folder) as seen:
        if row.says == IMMUNE:
            assert llmload.load(spec).model is not None
        else:
            with pytest.raises(RequestError) as caught:
                llmload.load(spec)
            message = str(caught.value)
            assert row.says in message
            assert len(message) < LONGEST_MESSAGE
            assert not seen.mapped
    assert harm(seen) == []
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("loader", ["streaming", "transformers"])
def test_only_files_that_were_checked_are_opened(loader: str, sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    for name in ("adapter_model.bin", "pytorch_model.bin", "optimizer.pt", "rng_state.pth"):
        canary(name)(folder)
    for name in ("config.4.0.0.json", "tokenizer.4.0.0.json", "modeling_evil.py", "x.safetensors"):
        (folder / name).write_text("{}")
    blocked = [] if loader == "streaming" else ["no:streaming"]
    with watching(folder) as seen:
        registry = llmload.create_registry(select=blocked)
        result = llmload.load({"model": str(folder)}, registry=registry)
    assert result.report.loader == loader
    # A tokenizer's files are vetted by their names, one of another version among them.
    assert seen.names() - {"."} <= VALIDATED | {"config.4.0.0.json", "tokenizer.4.0.0.json"}
    assert harm(seen) == []


def test_a_message_repeats_no_more_of_a_file_than_can_be_read() -> None:
    many = CheckpointError(Problem(message="x" * 10_000, where="y" * 10_000) for _ in range(300))
    shown = str(many).splitlines()
    assert shown[0] == f"{'y' * 4000}...: {'x' * 4000}..."
    assert shown[100:] == ["... and 200 more problems"]
