"""Of files that are not in memory a rank has the kernel read its parts and the headers, no more.

But for a page of each tensor, by which the ranks make sure that they read one checkpoint.
"""

from __future__ import annotations

import mmap
import shutil
from pathlib import Path

import pytest
import torch
from zero3.farm import Job, Outcome, launch

from llmload import testing
from llmload.checkpoint import Checkpoint, digests
from llmload.model.partitions import Span

pytestmark = pytest.mark.slow

RANKS = (2, 4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of one model for each of four ranks."""
    made = tmp_path_factory.mktemp("pages")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}
    model = testing.tiny_llama(made, name="model", dtype=torch.bfloat16, shards=2, **sizes)
    for rank in range(max(RANKS)):
        shutil.copytree(model, made / str(rank) / "model")
    return made


@pytest.fixture(scope="module")
def outcomes(place: Path) -> dict[int, list[Outcome]]:
    jobs = [Job("zero3.residency:load", {"place": str(place)}, ranks=ranks) for ranks in RANKS]
    return dict(zip(RANKS, launch(jobs, timeout=200), strict=True))


@pytest.mark.parametrize("ranks", RANKS)
def test_no_rank_touches_more_than_its_parts_and_the_headers(
    outcomes: dict[int, list[Outcome]], place: Path, ranks: int
) -> None:
    checkpoint = Checkpoint.open(place / "0" / "model")
    for rank, outcome in enumerate(outcomes[ranks]):
        assert outcome.code == 0, outcome.output
        if any(outcome.result["before"].values()):
            pytest.skip("the temporary folder is on a file system that forgets no page")
        assert outcome.result["loader"] == "streaming"
        parts: dict[str, set[int]] = {file.path.name: set() for file in checkpoint.files}
        others: dict[str, set[int]] = {file.path.name: set() for file in checkpoint.files}
        for tensor in checkpoint.tensors.values():
            span = Span.of(tensor.numel, rank, ranks)
            size = tensor.nbytes // tensor.numel
            own = pages(tensor.start + span.start * size, tensor.start + span.stop * size)
            parts[tensor.file.name] |= own
            _, start, length = digests._sample(tensor)
            others[tensor.file.name] |= pages(start, start + length)
        for file in checkpoint.files:
            first = min(t.start for t in checkpoint.tensors.values() if t.file == file.path)
            others[file.path.name] |= pages(0, first)
        for name, touched in outcome.result["after"].items():
            assert parts[name] <= set(touched)
            assert set(touched) <= parts[name] | others[name]
            whole = (place / "0" / "model" / name).stat().st_size // mmap.PAGESIZE
            assert len(touched) < 1.5 * whole / ranks


def pages(start: int, stop: int) -> set[int]:
    """Return the numbers of the pages that bytes of a file lie in."""
    return set(range(start // mmap.PAGESIZE, -(-stop // mmap.PAGESIZE)))
