"""What the plan and the simulation say of each rank is what real loads count."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import architectures
import pytest
import stacks
import torch
from zero3.farm import Job, Outcome, launch

import llmload
from llmload import testing
from llmload.builtin.zero3.parts import Share, share
from llmload.hf import installed_transformers
from llmload.host.registry import create_registry
from llmload.loading import planning

RANKS = {"two": 2, "four": 4, "merged on two": 2, "merged on four": 4}
if stacks.IS_MODERN:
    RANKS["computed"] = 2
"""``merged`` has experts that transformers makes one parameter of; of ``computed`` it reorders the
rows of some."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    llama = testing.tiny_llama(tmp_path_factory.mktemp("llama"), shards=2)
    mixtral, inkling = tmp_path_factory.mktemp("mixtral"), tmp_path_factory.mktemp("inkling")
    architectures.build("causal_lm", "mixtral").save_pretrained(mixtral, max_shard_size="20KB")
    if "computed" in RANKS:
        architectures.build("causal_lm", "inkling2_text").save_pretrained(inkling)
    # Parts large enough to stay on the file's pages; those that are padded are copied.
    wide = testing.tiny_llama(
        tmp_path_factory.mktemp("wide"),
        dtype=torch.bfloat16,
        hidden_size=256,
        intermediate_size=513,
        vocab_size=1025,
    )
    return {
        **dict.fromkeys(["two", "four"], Path(llama)),
        **dict.fromkeys(["merged on two", "merged on four"], mixtral),
        "computed": inkling,
        "wide": Path(wide),
    }


@pytest.fixture(scope="module")
def outcomes(folders: dict[str, Path]) -> dict[str, list[Outcome]]:
    jobs = [
        Job("zero3.reading:load", {"folder": str(folders[name]), "dtype": "bfloat16"}, ranks=ranks)
        for name, ranks in RANKS.items()
    ]
    case = {"kind": "causal_lm", "folder": str(folders["wide"]), "dtype": "bfloat16"}
    jobs.append(Job("zero3.comparing:many", {"cases": [case | {"threshold": None}]}, timeout=100))
    return dict(zip([*RANKS, "wide"], launch(jobs, timeout=200), strict=True))


def shares(folder: Path, ranks: int) -> list[Share]:
    registry = create_registry()
    spec = registry.validate({"model": str(folder), "dtype": "bfloat16", "zero3": {}})
    ctx = planning.prepare(spec, registry, download=planning.Download.NOTHING).ctx
    assert ctx.checkpoint
    accounting = installed_transformers().account(ctx.blank, ctx.checkpoint)
    return [share(ctx, accounting, rank, ranks) for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS)
def test_plan_foretells_what_each_rank_reads_and_keeps(
    outcomes: dict[str, list[Outcome]], folders: dict[str, Path], name: str
) -> None:
    expected = shares(folders[name], RANKS[name])
    for rank, outcome in enumerate(outcomes[name]):
        assert outcome.code == 0, outcome.output
        counted: dict[str, Any] = outcome.result
        assert sum(f["bytes_read"] for f in counted["files"].values()) == expected[rank].read
        assert counted["kept"] == expected[rank].kept
        assert f"ranks reads {expected[0].read:,} of" in counted["note"]
        assert counted["reads"].startswith(f"read {expected[rank].read:,} of ")
        computed = f"({expected[0].computed:,} of tensors that others are computed of, whole)"
        assert (computed in counted["note"]) == (name == "computed")
    assert (expected[0].computed > 0) == (name == "computed")


def test_plan_without_ranks_tells_what_each_of_several_would_read(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    plan = llmload.plan({"model": str(folders["two"]), "dtype": "bfloat16", "zero3": {}})
    notes = {step.plugin: step.notes for step in plan.steps if step.notes}
    size = f"{plan.checkpoint_bytes:,}"
    assert notes["streaming"] == [
        f"read a rank's part of {size} bytes from 3 file(s), each tensor once"
    ]
    left, each, *examples = notes["zero3"]
    assert left.startswith("`auto` is left to the training loop")
    assert each == "each rank reads and keeps its own part of every tensor"
    read = [shares(folders["two"], ranks)[0].read for ranks in (2, 4, 8)]
    for ranks, bytes_read, note in zip((2, 4, 8), read, examples, strict=True):
        assert note.startswith(f"each of {ranks} ranks reads {bytes_read:,} of {size} bytes and")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "four", "merged on two", "merged on four"])
def test_simulation_reads_file_by_file_what_real_ranks_read(
    outcomes: dict[str, list[Outcome]],
    folders: dict[str, Path],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    simulation = importlib.import_module("benchmarks.simulate")
    (together,) = simulation.simulate(folders[name], [RANKS[name]])
    for simulated, outcome in zip(together.ranks, outcomes[name], strict=True):
        assert outcome.code == 0, outcome.output
        found = {
            file.name: (simulated.read[file], simulated.reads[file]) for file in simulated.read
        }
        assert found == {
            file: (facts["bytes_read"], facts["reads"])
            for file, facts in outcome.result["files"].items()
        }
        assert simulated.kept == outcome.result["partitions"]


def test_simulation_notices_bytes_that_are_read_twice_or_not_at_all(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    simulation = importlib.import_module("benchmarks.simulate")
    from llmload.checkpoint import Checkpoint

    tensors = Checkpoint.open(folders["two"]).tensors
    (together,) = simulation.simulate(folders["two"], [3])
    assert together.faults(tensors.values()) == []
    first, second = list(tensors)[:2]
    together.pieces[first].pop()
    together.pieces[second].append((0, 2))
    assert together.faults(tensors.values()) == [first, second]


@pytest.mark.slow
def test_parts_on_the_pages_of_the_file_train_as_those_of_transformers(
    outcomes: dict[str, list[Outcome]],
) -> None:
    for outcome in outcomes["wide"]:
        assert outcome.code == 0, outcome.output
        (answer,) = outcome.result
        assert answer["differences"] == []
        mine, other = answer["losses"]
        assert mine == other
