"""Every causal model type of transformers, sharded on two ranks.

Run by ``nox -s fsdp_architectures`` and not with the other tests, as it takes long: shards,
buffers, ties and three training losses are held to those of ``from_pretrained`` with a
``distributed_config``, and to the unsharded model where that cannot do it or does otherwise. The
types are those of the core's own ``tests/architectures.py``.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import torch.distributed as dist
from ranks import alone, facts, unlike

import llmload
from llmload.testing import run_on_ranks

PARTS = 12
TYPES = architectures.causal_lm_types()

REFUSED: dict[str, str] = {}
"""Types that the plan refuses, with what it says."""
NOT_THEIRS: dict[str, str] = {
    # One expert: the other rank finds none of its own to stack.
    "hunyuan_v1_moe": "automatic conversion of the weights",
    # A rank's rows of weights are not what is merged, or taken apart.
    "inkling2_loop_text": "`ignore_mismatched_sizes`",
    "lara_mini": "automatic conversion of the weights",
    "sarvam_moe": "automatic conversion of the weights",
}
"""Types that transformers cannot load or train so, with what it says. Ours are the unsharded model.
"""
OTHERWISE: dict[str, str] = {
    "bailing_hybrid": "conv1d",  # a rank's rows of weights that are joined, as if they were all
    "falcon_h1": "mup_vector",  # a buffer that is not saved, left as the memory was
    "hrm_text": "H_module",  # a rank's rows of a fused weight, taken apart as if they were all
    "kimi_linear": "conv1d",
    "olmo_hybrid": "conv1d",
}
"""Types of which transformers' own is another model than its unsharded one, by a part of the names
of parameters or buffers that differ, with the reason. Ours are the unsharded model."""
UNTRAINED: dict[str, str] = {
    "git": "Expected input batch_size (0) to match target batch_size (14)",
    "reformer": "make sure to use `model.train()`",  # and then its hashes are drawn anew
    "rwkv": "must match the size of tensor b (64)",
    "xlstm": "modified by an inplace operation",
}
"""Types that cannot be trained so, unsharded neither, with what they say."""


def losses(model: Any, steps: int = 3) -> list[float] | str:
    """Train on the same texts on all ranks, without dropout; return what it raises in words."""
    torch.manual_seed(0)
    model.train(False)
    inputs = architectures.dummy_inputs(model, "causal_lm")
    inputs |= {"labels": inputs["input_ids"]}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    found = []
    try:
        for _ in range(steps):
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    except Exception as error:
        return _words(error)
    return found


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def ours(folder: str) -> dict[str, Any]:
    model = llmload.load(
        {"model": folder, "dtype": "float32", "strict": False, "parallel": {}}
    ).model
    with alone():
        plain = llmload.load({"model": folder, "dtype": "float32", "strict": False}).model
    found = facts(model) | {"unlike": unlike(model, plain)}
    return found | {"losses": losses(model), "unsharded": losses(plain)}


def theirs(folder: str) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(fsdp_size=dist.get_world_size())
    model, said = None, ""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="float32", distributed_config=config
        )
    except Exception as error:
        said = _words(error)
    everywhere: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everywhere, said)  # it may fail on some ranks alone
    if any(everywhere):
        raise RuntimeError(next(filter(None, everywhere)))
    return facts(model) | {"losses": losses(model)}


def compare(model_type: str, folder: str) -> dict[str, Any]:
    """Build a type tiny on rank 0, save it, and load it both ways."""
    if dist.get_rank() == 0:
        architectures.build("causal_lm", model_type).save_pretrained(folder)
    dist.barrier()
    answer: dict[str, Any] = {}
    for way in (ours, theirs):
        try:
            answer[way.__name__] = way(folder)
        except Exception as error:
            answer[way.__name__] = _words(error)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    return answer


def every(types: list[str], place: str) -> dict[str, dict[str, Any]]:
    """Compare many types in one process group."""
    return {name: compare(name, f"{place}/{name}") for name in types}


@pytest.fixture(scope="module")
def counts(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """How the comparisons ended; printed when all are done."""
    yield from architectures.counted(request, "types")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(PARTS))
def test_a_sharded_model_is_transformers_own_or_the_unsharded_one(
    part: int, tmp_path: Path, counts: Counter[str]
) -> None:
    types = TYPES[part::PARTS]
    unequal = []
    for rank, found in enumerate(run_on_ranks(every, types, str(tmp_path), timeout=850)):
        for name in types:
            outcome, fault = judge(name, found[name]["ours"], found[name]["theirs"])
            counts[outcome] += rank == 0
            if fault:
                unequal.append(f"{name} on rank {rank}: {fault}")
    assert not unequal, "\n".join(unequal)


def judge(name: str, mine: Any, other: Any) -> tuple[str, str]:
    """Return how a comparison ended, and what is wrong: exceptions that no longer hold too."""
    if isinstance(mine, str):
        return "refused", "" if REFUSED.get(name, "not refused") in mine else mine
    faults = [] if not mine["unlike"] else [f"unlike the unsharded: {mine['unlike'][:3]}"]
    if mine["losses"] != mine["unsharded"]:
        faults.append(f"losses {mine['losses']} for {mine['unsharded']} unsharded")
    if isinstance(mine["losses"], str) and UNTRAINED.get(name, "trained") not in mine["losses"]:
        faults.append(f"it is not trained: {mine['losses']}")
    if isinstance(other, str):
        outcome = "that transformers cannot load, equal to the unsharded model"
        return outcome, "; ".join([*faults, *_unexplained(NOT_THEIRS, name, other)])
    unlike_theirs = [w for w in ("parameters", "buffers", "ties", "losses") if mine[w] != other[w]]
    if not unlike_theirs:
        known = [f"{name} is equal now" for each in (NOT_THEIRS, OTHERWISE) if name in each]
        return "identical", "; ".join([*faults, *known])
    said = f"{', '.join(unlike_theirs)} unlike theirs"
    if isinstance(other["losses"], str):
        said = other["losses"]
        outcome = "that transformers cannot train so, equal to the unsharded model"
        return outcome, "; ".join([*faults, *_unexplained(NOT_THEIRS, name, said)])
    outcome = "of which transformers' own differs, equal to the unsharded model"
    differing = _differing(mine, other)
    return outcome, "; ".join([*faults, *_unexplained(OTHERWISE, name, f"{said}: {differing}")])


def _unexplained(table: dict[str, str], name: str, said: str) -> list[str]:
    return [] if table.get(name, "not expected") in said else [said]


def _differing(mine: dict[str, Any], other: dict[str, Any]) -> str:
    names = [
        key
        for what in ("parameters", "buffers")
        for key in sorted(mine[what].keys() | other[what].keys())
        if mine[what].get(key) != other[what].get(key)
    ]
    return f"{names[:3]} {mine['ties']} for {other['ties']}, {mine['losses']} for {other['losses']}"
