"""All that needs an accelerator, in ten minutes: ``python -m benchmarks.accelerator``.

Every test that is marked ``gpu``, then loads onto the device beside ``from_pretrained``, each in a
process of its own: first with the files out of memory, then with them in it. Both sides' weights
are compared by a checksum that the device computes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from . import zero3
from .case import OURS, Case, Mark
from .cold import evicted
from .folders import folder
from .kbit import KBIT, their_config
from .loading import weights_mib
from .measure import run_ranks

SIZES = ("1.1B", "8B")
THEIRS = "from_pretrained"


def device() -> str | None:
    """Return the first accelerator, or None."""
    import torch

    return "cuda:0" if torch.cuda.is_available() else None


# --- the sides ------------------------------------------------------------------------------------


def arrived(load: Callable[[Path], Any], folder: Path) -> Iterator[Mark]:
    """Load, and wait until the device has everything."""
    import torch

    torch.cuda.init()
    start = time.perf_counter()
    loaded = load(folder)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    rate = weights_mib(folder) * 2**20 / 1e9 / seconds
    peak = torch.cuda.max_memory_allocated() / 2**20
    yield "load", {"GB/s": rate, "device MiB": peak}
    yield "compare", {"checksum": _checksum(loaded)}


def _checksum(model: Any) -> float:
    """Add up what the model holds as integers, each tensor by its place; exact below 2**52."""
    import torch

    total = 0
    for place, (_, parameter) in enumerate(sorted(model.named_parameters()), start=1):
        held = getattr(parameter, "ds_tensor", parameter).detach().reshape(-1).view(torch.uint8)
        whole = held[: held.numel() // 4 * 4].view(torch.int32).sum(dtype=torch.int64)
        rest = held[held.numel() // 4 * 4 :].sum(dtype=torch.int64)
        total = (total + place * (int(whole) + int(rest))) % 2**52
    return float(total)


def with_llmload(folder: Path, **keys: Any) -> Any:
    """Load through llmload: plan, load, audit and report."""
    import llmload

    return llmload.load({"model": str(folder), "dtype": "bfloat16", **keys}).model


def with_transformers(folder: Path, dtype: str = "bfloat16", **options: Any) -> Any:
    """Load with transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options)


def quantised_with_transformers(folder: Path) -> Any:
    """Load with transformers, in 4 bits."""
    return with_transformers(folder, quantization_config=their_config(), device_map="cuda:0")


def join() -> None:
    """Make a group of this one rank, whose collectives the device does."""
    import deepspeed

    deepspeed.init_distributed(verbose=False)


def _case(
    title: str, ours: Callable[[Path], Any], theirs: Callable[[Path], Any], **of: Any
) -> Case:
    sides = {OURS: partial(arrived, ours), THEIRS: partial(arrived, theirs)}
    return Case(title=title, sides=sides, target="faster", final=weights_mib, sizes=SIZES, **of)


_ON_DEVICE = {"device_map": "cuda:0"}
CASES = {
    "bfloat16": _case(
        "bfloat16 as stored",
        partial(with_llmload, **_ON_DEVICE),
        partial(with_transformers, **_ON_DEVICE),
    ),
    "float32": _case(
        "bfloat16 to float32",
        partial(with_llmload, **_ON_DEVICE | {"dtype": "float32"}),
        partial(with_transformers, **_ON_DEVICE | {"dtype": "float32"}),
    ),
    "nf4": _case(
        "nf4, double quantisation",
        partial(with_llmload, kbit=KBIT),
        quantised_with_transformers,
        imports=("accelerate", "bitsandbytes"),
    ),
    "zero3": _case(
        "ZeRO-3, one rank",
        partial(with_llmload, zero3={"config": zero3.config()}),
        zero3.their_load,
        imports=("deepspeed",),
        prepare=join,
    ),
}


# --- the command ----------------------------------------------------------------------------------


def main(
    minutes: Annotated[float, typer.Option(help="After which no further load is begun.")] = 10.0,
    size: Annotated[list[str] | None, typer.Option(help="Only this size; repeatable.")] = None,
    tests: Annotated[bool, typer.Option(help="Run the tests marked `gpu` first.")] = True,
    threads: Annotated[int, typer.Option(help="Threads of a load.")] = 8,
    work: Annotated[Path, typer.Option(help="Where checkpoint folders are kept.")] = Path("build"),
) -> None:
    """Run the tests that need an accelerator, and load onto it beside `from_pretrained`.

    Fails where a test fails or where the two sides' weights differ.
    """
    if device() is None:
        print("There is no accelerator here: torch sees no CUDA device. Nothing was run.")
        return
    end = time.monotonic() + 60 * minutes
    failed = False
    if tests:
        files = [f for f in sorted(Path("tests").rglob("test_*.py")) if "mark.gpu" in f.read_text()]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *map(str, files)]
        failed = subprocess.run(command).returncode != 0
    print("| load | size | files | " + " | ".join((OURS, THEIRS)) + " | same bits |")
    print("|---|---|---|---|---|---|")
    for each in size or SIZES:
        for name, case in CASES.items():
            for state in ("cold", "warm"):
                if time.monotonic() > end:
                    print(f"| {case.title} | {each} | {state} | no time was left | | |")
                    continue
                same = _compared(name, case, each, state, threads, work)
                failed = failed or not same
    raise typer.Exit(int(failed))


def _compared(name: str, case: Case, size: str, state: str, threads: int, work: Path) -> bool:
    """Run both sides once, print a row, and return whether their weights agree."""
    made = folder(work, size)
    cells, sums = [], set()
    for side in case.sides:
        command = ["accelerator", name, side, str(made)]
        try:
            with evicted(made) if state == "cold" else nullcontext(made):
                run = run_ranks(sys.executable, command, ranks=1, threads=threads)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            cells.append("failed")
            continue
        load, compared = run.phases
        sums.add(compared.figures["checksum"])
        cells.append(
            f"{load.seconds:.2f} s, {load.figures['GB/s']:.1f} GB/s,"
            f" {load.figures['device MiB']:,.0f} MiB on the device"
        )
    agree = len(sums) == 1 and "failed" not in cells
    print(f"| {case.title} | {size} | {state} | {' | '.join(cells)} | {'yes' if agree else 'NO'} |")
    return agree


if __name__ == "__main__":
    typer.run(main)
