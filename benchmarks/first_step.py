"""From nothing to the end of the first training step: ``python -m benchmarks.first_step``.

Each side is a script in processes of its own, ours and the one that is commonly written, and says
how long each part of it took: its imports, the plan, the load (with adapter and preparation),
DeepSpeed's ``initialize``, the first step. Sides alternate; figures are medians in seconds of wall
time, of the slowest rank.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from . import kbit
from .folders import SIZES, folder
from .measure import environment, free_port, of_rank
from .zero3 import config

app = typer.Typer(add_completion=False)

PARTS = ("import", "plan", "load", "initialize", "step")
_TOKENS = 16
_LORA = {"r": 16, "target_modules": "all-linear"}
_CONFIG = config() | {"zero_allow_untested_optimizer": True}
_SIDES = ("llmload", "by hand")
_DEADLINE_SECONDS = 600


class Clock:
    """Notes how long each part of a script took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block."""
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def _step(model: Any, optimizer: Any) -> None:
    import torch

    tokens = torch.arange(_TOKENS).unsqueeze(0)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def _train(clock: Clock, model: Any) -> None:
    import torch

    with clock.part("step"):
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        _step(model, torch.optim.AdamW(trained, lr=1e-4))


def _ours(clock: Clock, place: Path, **keys: Any) -> Any:
    spec = {"model": str(place), "dtype": "bfloat16", **keys}
    with clock.part("import"):
        import torch  # noqa: F401 - a training script has it anyway

        import llmload

        registry = llmload.create_registry()
    with clock.part("load"):
        result = llmload.load(spec, registry=registry)
    plan = sum(phase.seconds for phase in result.report.phases if phase.name == "plan")
    clock.seconds |= {"plan": plan, "load": clock.seconds["load"] - plan}
    return result.model


def lora(clock: Clock, place: Path) -> None:
    """LoRA on every linear layer, by llmload."""
    _train(clock, _ours(clock, place, lora=_LORA))


def lora_by_hand(clock: Clock, place: Path) -> None:
    """The same with transformers and PEFT."""
    with clock.part("import"):
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
    with clock.part("load"):
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **_LORA))
    _train(clock, wrapped)


def qlora(clock: Clock, place: Path) -> None:
    """LoRA on 4 bits, by llmload."""
    _train(clock, _ours(clock, place, lora=_LORA, kbit={"double_quant": True}))


def qlora_by_hand(clock: Clock, place: Path) -> None:
    """The same with transformers, bitsandbytes and PEFT."""
    with clock.part("import"):
        import torch
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: F401
    with clock.part("load"):
        model = AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.bfloat16, quantization_config=kbit.their_config()
        )
        model = prepare_model_for_kbit_training(model)
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **_LORA))
    _train(clock, wrapped)


def _initialised(clock: Clock, model: Any) -> None:
    import torch

    with clock.part("initialize"):
        import deepspeed

        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=_CONFIG)
    with clock.part("step"):
        tokens = torch.arange(_TOKENS).unsqueeze(0)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    torch.distributed.destroy_process_group()


def zero3(clock: Clock, place: Path) -> None:
    """A part on each of two ranks, by llmload."""
    _initialised(clock, _ours(clock, place, zero3={"config": _CONFIG}))


def zero3_by_hand(clock: Clock, place: Path) -> None:
    """The same with transformers, as its documentation shows."""
    with clock.part("import"):
        import deepspeed
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.integrations import HfDeepSpeedConfig
    with clock.part("load"):
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        alive = HfDeepSpeedConfig(_CONFIG)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
        del alive
    _initialised(clock, model)


KINDS: dict[str, tuple[Callable[[Clock, Path], None], Callable[[Clock, Path], None], int]] = {
    "lora": (lora, lora_by_hand, 1),
    "qlora": (qlora, qlora_by_hand, 1),
    "zero3": (zero3, zero3_by_hand, 2),
}
"""Ours, theirs, and the ranks of each."""


@app.callback(invoke_without_command=True)
def compare(
    context: typer.Context,
    kind: Annotated[list[str] | None, typer.Option(help="Of lora, qlora, zero3.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="Of a Llama.")] = None,
    pairs: Annotated[int, typer.Option(help="Alternating runs of each side.")] = 3,
    work: Annotated[Path, typer.Option(help="Where checkpoint folders are kept.")] = Path("build"),
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("benchmarks/results"),
) -> None:
    """Run both sides of each kind and size; rewrite the rows that were measured."""
    if context.invoked_subcommand:
        return
    from . import results

    file = out / "first_step.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    for each in size or ("0.1B", "1.1B"):
        made = folder(work, each)
        for name in kind or KINDS:
            runs: dict[str, list[dict[str, float]]] = {side: [] for side in _SIDES}
            for number in range(pairs + 1):  # the first fills caches, and compiles
                for side in _SIDES:
                    found = _run(name, side, made)
                    runs[side] += [found] if number else []
            for side in _SIDES:
                row = {"kind": name, "size": each, "side": side} | _medians(runs[side])
                rows = [old for old in rows if _key(old) != _key(row)]
                rows.append(row | {"under": results.conditions(sys.executable, 2)})
                print(json.dumps(row), file=sys.stderr)
            rows.sort(key=lambda row: (list(KINDS).index(row["kind"]), [*SIZES].index(row["size"])))
            file.write_text(json.dumps(rows, indent=1) + "\n")
            (out / "first_step.md").write_text(_page(rows))


@app.command()
def script(kind: str, side: str, place: Path) -> None:
    """Be one process of one side, and print what each part took."""
    clock = Clock()
    KINDS[kind][_SIDES.index(side)](clock, place)
    print(f"\n{json.dumps(clock.seconds)}")


def _run(kind: str, side: str, place: Path) -> dict[str, float]:
    """Run one side on all its ranks; return the seconds of the slowest."""
    ranks, port = KINDS[kind][2], free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.first_step", "script", kind, side, str(place)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(2 // ranks) | (of_rank(rank, ranks, port) if ranks > 1 else {}),
        )
        for rank in range(ranks)
    ]
    found = []
    for process in processes:
        said, errors = process.communicate(timeout=_DEADLINE_SECONDS)
        if process.returncode:
            raise RuntimeError(f"{kind}, {side}: {errors[-2000:]}")
        found.append(json.loads(said.splitlines()[-1]))
    return max(found, key=lambda seconds: sum(seconds.values()))


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    found = {part: statistics.median(run.get(part, 0.0) for run in runs) for part in PARTS}
    return found | {"all": statistics.median(sum(run.values()) for run in runs)}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["kind"], row["size"], row["side"]


def _page(rows: list[dict[str, Any]]) -> str:
    under = rows[-1]["under"]
    versions = ", ".join(f"{name} {version}" for name, version in under["versions"].items())
    lines = [
        "# To the first step",
        "",
        "`python -m benchmarks.first_step`: seconds of wall time from the start of a script to the"
        " end of its first training step, part by part, medians of alternating runs.",
        "",
        f"| kind | size | side | {' | '.join(PARTS)} | all |",
        f"|---|---|---|{'---|' * (len(PARTS) + 1)}",
        *(
            f"| {row['kind']} | {row['size']} | {row['side']} | "
            + " | ".join(f"{row[part]:.2f}" for part in (*PARTS, "all"))
            + " |"
            for row in rows
        ),
        "",
        f"{under['date']}; {under['machine']}; {versions}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app()
