"""ZeRO-3: every rank reads its own part, against transformers, whose rank 0 sends everything.

transformers' rank 0 reads the whole checkpoint and the others nothing; how many bytes a rank of
ours reads is among the figures.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .case import Case, Mark

TITLE = "ZeRO-3 on several ranks, side by side"

IMPORTS = ("accelerate", "deepspeed", "llmload.builtin.zero3.loading_session")
_MIB = 2**20
_FASTER_ON_TWO = "at least 8x faster, stretch 12x; peak RSS at most 1.03x a rank's part"
_FASTER_ON_FOUR = "at least 15x faster, stretch 25x; peak RSS at most 1.03x a rank's part"


def config() -> dict[str, Any]:
    """Return the DeepSpeed config of both sides, all defaults."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
    }


def join() -> None:
    """Join the ranks, which compiles DeepSpeed's shared-memory collectives the first time."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def part_mib(folder: Path, ranks: int) -> float:
    """Return what one rank keeps of a checkpoint, padding included, in MiB."""
    from llmload.checkpoint import Checkpoint
    from llmload.model.partitions import Span

    tensors = Checkpoint.open(folder).tensors.values()
    kept = sum(Span.of(t.numel, 0, ranks).size * t.nbytes // t.numel for t in tensors)
    return kept / _MIB


def our_load(folder: Path) -> Any:
    """Load through llmload: plan, load, audit and report."""
    import llmload

    spec = {"model": str(folder), "dtype": "bfloat16", "zero3": {"config": config()}}
    return llmload.load(spec)


def their_load(folder: Path) -> Any:
    """Load with transformers while its DeepSpeed config is alive, as its documentation shows."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(config())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    del alive
    return model


def ours(folder: Path, *, train: bool = False) -> Iterator[Mark]:
    """Load through llmload, and let DeepSpeed initialize where asked."""
    result = our_load(folder)
    files = result.report.facts["streaming"]["files"].values()
    yield "load", {"MiB read by a rank": sum(file["bytes_read"] for file in files) / _MIB}
    if train:
        yield from _initialize(result.model)


def theirs(folder: Path, *, train: bool = False) -> Iterator[Mark]:
    """The same with transformers."""
    model = their_load(folder)
    yield "load"
    if train:
        yield from _initialize(model)


def _initialize(model: Any) -> Iterator[Mark]:
    import deepspeed
    import torch

    gc.collect()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config=config() | {"zero_allow_untested_optimizer": True},
    )
    yield "initialize"
    engine.destroy()


def _case(title: str, target: str, ranks: int, sizes: tuple[str, ...], **options: Any) -> Case:
    return Case(
        title=title,
        sides={
            "llmload": partial(ours, **options),
            "from_pretrained": partial(theirs, **options),
        },
        target=target,
        final=partial(part_mib, ranks=ranks),
        sizes=sizes,
        imports=IMPORTS,
        prepare=join,
        ranks=ranks,
    )


CASES = {
    "two-ranks": _case("2 ranks", _FASTER_ON_TWO, 2, ("0.5B", "1.1B", "3B")),
    "four-ranks": _case("4 ranks", _FASTER_ON_FOUR, 4, ("0.5B", "1.1B")),
    "initialize": _case(
        "2 ranks, then deepspeed.initialize", "reported", 2, ("0.5B", "1.1B"), train=True
    ),
}
