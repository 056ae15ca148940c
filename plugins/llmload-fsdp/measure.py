"""Seconds and memory of one sharded load on two ranks, beside transformers' own, alternating.

``python measure.py dense bfloat16 3``: kind of model (``dense``, 1.1 billion parameters, or
``experts``, 0.44), dtype to load in from bfloat16, and how often each. Both load a tiny model
first, so that imports do not count. The model is made in the folder that ``MEASURE_DIR`` names.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from llmload.testing import run_on_ranks, tiny_checkpoint

MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "dense": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
        },
    ),
    "experts": (
        "mixtral",
        {
            "vocab_size": 8000,
            "hidden_size": 1024,
            "intermediate_size": 2048,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
}


def load(way: str, folder: str, dtype: str) -> Any:
    """Load with llmload, or as transformers does by itself."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    import llmload

    if way == "llmload":
        return llmload.load({"model": folder, "dtype": dtype, "parallel": {}}).model
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=config)


def measured(way: str, folder: str, small: str, dtype: str) -> dict[str, float]:
    """Load on this rank; memory in MiB beyond what was there before."""
    import torch.distributed as dist

    load(way, small, dtype)
    gc.collect()
    dist.barrier()
    before = _memory()
    peaks, stop = dict(before), threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            peaks.update({name: max(peaks[name], now) for name, now in _memory().items()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = load(way, folder, dtype)
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    shard = sum(parameter.to_local().nbytes for parameter in model.parameters())
    taken = {name: (peaks[name] - before[name]) / 2**20 for name in peaks}
    return {"seconds": seconds, **taken, "shard": shard / 2**20}


def _memory() -> dict[str, int]:
    """Return what is private to this process, and all that is resident, in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    found = {line.partition(":")[0]: line.split()[1] for line in lines[1:]}
    return {"private": int(found["Anonymous"]) * 1024, "resident": int(found["Rss"]) * 1024}


def _made(kind: str, place: Path) -> Path:
    """Make the model where it is not there yet: of one value, which no load looks at."""
    folder = place / kind
    if not folder.exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        model_type, sizes = MODELS[kind]
        with no_init_weights():
            config = AutoConfig.for_model(model_type, **sizes)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for parameter in model.parameters():
            parameter.data.fill_(0.01)
        model.save_pretrained(folder, max_shard_size="1GB")
    return folder


def main(kind: str, dtype: str, times: str) -> None:
    """Measure, and print a line for each load and rank."""
    place = Path(os.environ.get("MEASURE_DIR", "measured"))
    place.mkdir(exist_ok=True)
    folder, small = _made(kind, place), place / "small"
    if not small.exists():
        tiny_checkpoint(small, "llama")
    for number in range(int(times)):
        ways = ("llmload", "transformers")
        for way in ways if number % 2 == 0 else reversed(ways):
            found = run_on_ranks(measured, way, str(folder), str(small), dtype, timeout=300)
            for rank, values in enumerate(found):
                told = "  ".join(f"{name} {value:.2f}" for name, value in values.items())
                print(f"{kind} {dtype} {way} rank {rank}: {told}")  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
