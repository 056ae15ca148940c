"""Memory as the plan foretells it beside what a load takes: ``python -m benchmarks.memory``."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from llmload.loading.forecasting import ALLOCATOR

from .case import Case, Mark
from .colossalai import import_colossalai
from .folders import folder
from .measure import Phase, run_ranks
from .zero3 import join

TITLE = "Memory, foretold and measured"
_MIB = 2**20
_TOKENS = 8
_LIVE = 20_000_000
"""Parameters that ZeRO-3 may keep gathered, and gradients that go to their ranks together."""
_LITTLE = 256
"""MiB below which a share says nothing."""
_STEADY = {"MALLOC_MMAP_THRESHOLD_": "262144"}
"""glibc raises this bound by itself, and then keeps what is freed below it for later."""
_ADAPTER = {"r": 16, "target_modules": "all-linear"}
_QLORA = {"kbit": {"double_quant": True}, "lora": _ADAPTER}


def one(folder: Path, *, train: bool = False, **keys: Any) -> Iterator[Mark]:
    """Load, use every weight once, and train one step where asked."""
    import llmload

    result = llmload.load({"model": str(folder), **keys})
    yield "load", _foretold(result.plan, "load", "finish")
    gc.collect()
    use(result.model)
    yield "use", _foretold(result.plan, "use")
    if train:
        step(result.model)
        yield "train", _foretold(result.plan, "train")


def two(folder: Path) -> Iterator[Mark]:
    """Load a policy and its frozen reference in float32, and use every weight once."""
    import llmload

    model = {"model": str(folder), "dtype": "float32"}
    members = {"policy": model, "reference": {"like": "policy", "trainable": False}}
    group = llmload.load_group({"models": members})
    plans = group.plan
    yield "load", _mib(sum(peak.host for peak in plans.memory if peak.phase == "finish"))
    for member in group.values():
        use(member.model)
    together = [peak.host + peak.pages for peak in plans.memory if peak.phase == "use"]
    yield "use", _mib(sum(together))


def parted(folder: Path) -> Iterator[Mark]:
    """Load under ZeRO-3 with few weights gathered at a time, and train one step with SGD.

    AdamW's states of 1.1B parameters would not fit into this machine.
    """
    import deepspeed
    import torch

    import llmload

    config = {
        "zero_optimization": {
            "stage": 3,
            "stage3_max_live_parameters": _LIVE,
            "stage3_prefetch_bucket_size": _LIVE,
            "reduce_bucket_size": _LIVE,
        },
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": 1,
    }
    spec = {"model": str(folder), "dtype": "bfloat16", "zero3": {"config": config}}
    # A load plans for the usual optimizer.
    plan = llmload.plan(spec, machine=llmload.Machine(optimizer="sgd"))
    result = llmload.load(spec)
    yield "load", _foretold(plan, "load", "finish")
    gc.collect()
    engine, *_ = deepspeed.initialize(
        model=result.model,
        optimizer=torch.optim.SGD(result.model.parameters(), lr=1e-4),
        config=config | {"zero_allow_untested_optimizer": True},
    )
    ids = torch.arange(_TOKENS).unsqueeze(0)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    yield "train", _foretold(plan, "train")
    engine.destroy()


def use(model: Any) -> None:
    """Look at every page of every weight."""
    import torch

    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            flat = tensor.detach().reshape(-1)
            flat[:: max(1, 2048 // flat.element_size())].clone()


def step(model: Any) -> None:
    """Train one step on a few tokens."""
    import torch

    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.arange(_TOKENS).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def _foretold(plan: Any, *phases: str) -> dict[str, float]:
    peaks = [plan.memory.peak(phase) for phase in phases]
    kept = sum(item.nbytes for item in plan.memory.items if item.what == ALLOCATOR)
    return _mib(max(peak.host + peak.pages for peak in peaks), kept)


def _mib(nbytes: float, kept: float = 0) -> dict[str, float]:
    return {"foretold": nbytes / _MIB, "without": (nbytes - kept) / _MIB}


def _warm(side: Any) -> None:
    """Do all of it once with a tiny model: what libraries set up for themselves is there then."""
    from llmload.testing import tiny_checkpoint

    with TemporaryDirectory() as place:
        for _ in side(tiny_checkpoint(Path(place) / "tiny", hidden_size=64, intermediate_size=160)):
            pass
    gc.collect()


def _case(title: str, side: Any, *, warm: bool = False, **options: Any) -> Case:
    """Make a case of one side.

    :param warm: do all of it with a tiny model first; for what is little beside the libraries.
    """
    if warm:
        options["prepare"] = partial(_warm, side)
    return Case(
        title=title,
        sides={"llmload": side},
        target="within 5 %",
        final=lambda _: 0,
        sizes=("1.1B",),
        **options,
    )


_WIDE = partial(folder, dtype="float32")
CASES = {
    "plain": _case("as stored, bfloat16, AdamW", partial(one, train=True)),
    "wider": _case("bfloat16 cast to float32", partial(one, dtype="float32")),
    "narrower": _case(
        "float32 cast to bfloat16, AdamW",
        partial(one, dtype="bfloat16", train=True),
        checkpoint=_WIDE,
    ),
    "kbit": _case(
        "4 bits, statistics quantised",
        partial(one, kbit={"double_quant": True}),
        warm=True,
        imports=("bitsandbytes",),
    ),
    "qlora": _case(
        "the same with LoRA on every layer, AdamW",
        partial(one, train=True, **_QLORA),
        warm=True,
        imports=("bitsandbytes", "peft"),
    ),
    "lora": _case(
        "LoRA on every layer, AdamW", partial(one, train=True, lora=_ADAPTER), imports=("peft",)
    ),
    "lazy": _case(
        "lazily built by ColossalAI and filled, AdamW",
        partial(one, train=True, colossalai={}),
        prepare=import_colossalai,
    ),
    **{
        f"{count}-ranks": _case(
            f"ZeRO-3 on {ranks} ranks, float32 cast to bfloat16, SGD",
            parted,
            checkpoint=_WIDE,
            ranks=ranks,
            imports=("deepspeed", "transformers.integrations.deepspeed"),
            prepare=join,
        )
        for count, ranks in (("two", 2), ("four", 4))
    },
    "group": _case("a policy and its frozen reference, cast to float32", two),
}


def main(
    case: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(CASES)}.")] = None,
    size: Annotated[str, typer.Option(help="Of the models.")] = "1.1B",
    work: Annotated[Path, typer.Option(help="Where checkpoint folders are kept.")] = Path("build"),
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("benchmarks/results"),
) -> None:
    """Compare what plans foretell with what loads take; a partial run keeps the other rows."""
    from . import results

    file = out / "memory.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else {}
    for name in case or CASES:
        made = CASES[name].checkpoint(work, size)
        arguments = ["memory", name, "llmload", str(made)]
        ranks = CASES[name].ranks
        runs = []
        for setting in ({}, _STEADY):
            with _environment(setting):
                runs.append(run_ranks(sys.executable, arguments, ranks=ranks, threads=2))
        pairs = zip(*(run.phases for run in runs), strict=True)
        rows[name] = [_row(name, size, *phases) for phases in pairs]
        for row in rows[name]:
            print(_line(row), file=sys.stderr)
    found = {
        "rows": {name: rows[name] for name in CASES if name in rows},
        "under": results.conditions(sys.executable, 2),
    }
    file.write_text(json.dumps(found, indent=1) + "\n")
    (out / "memory.md").write_text(page(found))


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def _row(name: str, size: str, phase: Phase, steady: Phase) -> dict[str, Any]:
    return {
        "title": CASES[name].title,
        "size": size,
        "phase": phase.name,
        "foretold": phase.figures["foretold"],
        "without": phase.figures["without"],
        "measured": phase.peak_rss_mib,
        "steady": steady.peak_rss_mib,
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"| {row['title']} | {row['phase']} | {row['foretold']:.0f} | {row['measured']:.0f}"
        f" | {_off(row, 'measured')} | {row['steady']:.0f} | {_off(row, 'steady')} |"
    )


def _off(row: dict[str, Any], measured: str) -> str:
    """Return how far off it is; of little, in MiB."""
    foretold = row["without" if measured == "steady" else "foretold"]
    difference = foretold - row[measured]
    if row[measured] < _LITTLE:
        return f"{difference:+.0f} MiB"
    return f"{100 * difference / row[measured]:+.1f} %"


def page(found: dict[str, Any]) -> str:
    """Return the results as a Markdown page."""
    under = found["under"]
    versions = ", ".join(f"{name} {version}" for name, version in under["versions"].items())
    lines = [
        f"# {TITLE}",
        "",
        "`python -m benchmarks.memory`: the peak of each phase in MiB, of the largest rank, pages"
        " of files included, above the process with its imports done, in 4 bits above one that has"
        " done all of it with a tiny model. `load` is the whole load,"
        " `use` a look at every weight, `train` a step on 8 tokens. The last two columns are a"
        " second run with `MALLOC_MMAP_THRESHOLD_=262144`, in which glibc's allocator gives back"
        " what is freed; they are held to what is foretold but for that.",
        "",
        "| case | phase | foretold | measured | off by | allocator held | off by |",
        "|---|---|---|---|---|---|---|",
        *(_line(row) for rows in found["rows"].values() for row in rows),
        "",
        f"{under['date']}; {under['machine']}; {versions}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
