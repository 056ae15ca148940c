"""A large model under ZeRO-3, bit for bit transformers' own: ``python -m benchmarks.equality``.

Each side loads in processes of its own, so that a model fits that would not fit twice. Every rank
writes down SHA-256 of its partitions (without padding) and of its buffers, then trains a few steps
of SGD; the two sides' answers must be the same, rank by rank, losses to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from .folders import folder
from .measure import environment

app = typer.Typer(add_completion=False)

SIDES = ("llmload", "transformers")
DEFAULT = "default"
"""Stands for DeepSpeed's own ``stage3_param_persistence_threshold``."""

_RETURNED = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""Has glibc give back what is freed; else training on four ranks takes twice the memory."""


@app.callback(invoke_without_command=True)
def compare(
    context: typer.Context,
    ranks: Annotated[list[int] | None, typer.Option(help="Numbers of ranks.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Dtypes of the model.")] = None,
    threshold: Annotated[list[str] | None, typer.Option(help="Elements, or `default`.")] = None,
    size: Annotated[str, typer.Option(help="Size of the Llama.")] = "1.1B",
    steps: Annotated[int, typer.Option(help="Steps of training; 0 for none.")] = 3,
    work: Annotated[Path, typer.Option(help="Where checkpoint folders are kept.")] = Path("build"),
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("benchmarks/results"),
) -> None:
    """Load and train both ways and compare every rank's digests and losses."""
    if context.invoked_subcommand:
        return
    from . import results

    made, failed = folder(work, size, "bfloat16"), False
    file = out / "equality.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    for number, name, limit in product(
        ranks or (2, 4), dtype or ("bfloat16", "float32"), threshold or ("0", DEFAULT)
    ):
        start = time.perf_counter()
        asked = [str(made), name, limit, str(steps)]
        ours, theirs = ([_Answer(**a) for a in _launch(number, [s, *asked])] for s in SIDES)
        key = {"size": size, "ranks": number, "dtype": name, "threshold": limit}
        row = key | {
            "partitions": [a.partitions for a in ours] == [b.partitions for b in theirs],
            "buffers": [a.buffers for a in ours] == [b.buffers for b in theirs],
            "losses": [a.losses for a in ours] == [b.losses for b in theirs] if steps else None,
            "tensors": ours[0].tensors,
            "seen": ours[0].losses,
            "under": results.conditions(sys.executable, 1),
        }
        failed = failed or False in (row["partitions"], row["buffers"], row["losses"])
        print(json.dumps(row | {"seconds": time.perf_counter() - start}), file=sys.stderr)
        rows = [old for old in rows if not key.items() <= old.items()] + [row]
        file.write_text(json.dumps(rows, indent=1) + "\n")
        (out / "equality.md").write_text(page(rows))
    raise typer.Exit(int(failed))


class _Answer:
    """What one rank wrote down."""

    def __init__(
        self, partitions: str, buffers: str, tensors: int, losses: list[float] | None
    ) -> None:
        self.partitions = partitions
        self.buffers = buffers
        self.tensors = tensors
        self.losses = losses


def page(rows: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown page."""
    words = {True: "equal", False: "DIFFERENT", None: "not run"}
    lines = [
        "# ZeRO-3: partitions, buffers and losses against transformers' own load",
        "",
        "`python -m benchmarks.equality`: SHA-256 of every rank's partitions (padding excluded) and"
        " buffers, and the losses of SGD steps, all ranks compared. Llama, stored in bfloat16.",
        "",
        "| model | ranks | dtype | persistence threshold | tensors | partitions | buffers | losses"
        " | losses on rank 0 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seen = ", ".join(f"{loss:.6f}" for loss in row["seen"] or ())
        said = " | ".join(words[row[what]] for what in ("partitions", "buffers", "losses"))
        lines.append(
            f"| {row['size']} | {row['ranks']} | {row['dtype']} | {row['threshold']}"
            f" | {row['tensors']} | {said} | {seen} |"
        )
    under = rows[-1]["under"]
    versions = ", ".join(f"{name} {version}" for name, version in under["versions"].items())
    return "\n".join([*lines, "", f"{under['date']}; {under['machine']}; {versions}."]) + "\n"


def _launch(ranks: int, arguments: list[str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as answers:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(ranks), "-m", "benchmarks.equality", "rank"]
        subprocess.run([*command, *arguments, answers], check=True, env=environment(1) | _RETURNED)
        return [json.loads(Path(answers, str(rank)).read_text()) for rank in range(ranks)]


@app.command(hidden=True)
def rank(side: str, made: Path, dtype: str, threshold: str, steps: int, answers: Path) -> None:
    """Load on one rank, write down digests, train, write down losses."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    zero: dict[str, Any] = {
        "stage": 3,
        # Training is to fit into memory too: few parameters are whole at once.
        "reduce_bucket_size": 10**7,
        "sub_group_size": 10**8,
        "stage3_max_live_parameters": 10**7,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 10**6,
    }
    if threshold != DEFAULT:
        zero["stage3_param_persistence_threshold"] = int(threshold)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
    }
    model = {"llmload": _ours, "transformers": _theirs}[side](made, dtype, config)
    answer = digests(model) | {"losses": _losses(model, config, steps) if steps else None}
    Path(answers, os.environ["RANK"]).write_text(json.dumps(answer))


def _ours(made: Path, dtype: str, config: dict[str, Any]) -> Any:
    import llmload

    result = llmload.load({"model": str(made), "dtype": dtype, "zero3": {"config": config}})
    assert result.report.loader == "streaming", result.report.declined
    return result.model


def _theirs(made: Path, dtype: str, config: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(config)
    model = AutoModelForCausalLM.from_pretrained(made, dtype=getattr(torch, dtype))
    del alive
    return model


def digests(model: Any) -> dict[str, Any]:
    """Return SHA-256 of this rank's partitions and of its buffers, names and dtypes included."""
    import torch

    from llmload.model import partitions

    def digest(tensors: Any) -> str:
        found = hashlib.sha256()
        for name, tensor, values in tensors:
            about = (name, str(tensor.dtype), partitions.shape(tensor), tensor.requires_grad)
            found.update(repr(about).encode())
            found.update(values.contiguous().view(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def parts() -> Any:
        for name, parameter in model.named_parameters():
            held = partitions.held(parameter)
            assert held is not None
            assert partitions.is_partitioned(parameter), name
            yield name, parameter, held[0]

    return {
        "partitions": digest(parts()),
        "buffers": digest((name, buffer, buffer) for name, buffer in model.named_buffers()),
        "tensors": len(list(model.parameters())),
    }


def _losses(model: Any, config: dict[str, Any], steps: int) -> list[float]:
    import deepspeed
    import torch

    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config | {"zero_allow_untested_optimizer": True}
    )
    ids = torch.arange(4, 12).reshape(1, 8) + torch.distributed.get_rank()
    found = []
    for _ in range(steps):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


if __name__ == "__main__":
    app()
