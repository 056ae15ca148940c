"""FSDP2: every rank reads its rows, against transformers, accelerate and PyTorch's own reader.

accelerate's Accelerator knows no FSDP on a CPU, so that its functions are called as it calls them.
PyTorch's reader knows no tensor that the model names or merges otherwise than the checkpoint, and
no buffer that is not in it: it loads the dense model alone, whose buffers transformers makes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .case import Case, Mark
from .zero3 import part_mib

TITLE = "FSDP2 on several ranks, side by side"

_MIB = 2**20
_EXPERTS = {
    "vocab_size": 8000,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def experts(root: Path, size: str, dtype: str = "bfloat16") -> Path:
    """Return the folder of a Mixtral of 0.44 billion parameters, made if it is not there yet."""
    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig

    made = root / f"mixtral-{size}-{dtype}"
    if not (made / "config.json").is_file():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(MixtralConfig(**_EXPERTS), dtype=torch.bfloat16)
        model.save_pretrained(made, max_shard_size="250MB")
    return made


def join() -> None:
    """Join the ranks."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()


def ours(folder: Path, *, dtype: str = "bfloat16") -> Any:
    """Load through llmload: plan, load, audit and report."""
    import llmload

    return llmload.load({"model": str(folder), "dtype": dtype, "parallel": {}})


def theirs(folder: Path, *, dtype: str = "bfloat16") -> Any:
    """Let transformers shard while it loads."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(fsdp_size=dist.get_world_size())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=config)


def by_accelerate(folder: Path, *, dtype: str = "bfloat16") -> Any:
    """Load on rank 0 and send from there, as ``cpu_ram_efficient_loading`` has accelerate do."""
    import torch
    import torch.distributed as dist
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from transformers import AutoModelForCausalLM

    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=True, auto_wrap_policy="transformer_based_wrap"
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


def by_torch(folder: Path) -> Any:
    """Shard on the meta device by transformers' units, and let ``torch.distributed.checkpoint``
    read; the one buffer is made anew."""
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.model.embed_tokens, *model.model.layers):
        fully_shard(module, mesh=mesh)
    fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    load(model.state_dict(), storage_reader=HuggingFaceStorageReader(str(folder)))
    return model


def load(folder: Path, side: Callable[..., Any], **options: Any) -> Iterator[Mark]:
    """Load, and say what it took of the processor, whatever else the machine did."""
    start = time.process_time()
    loaded = side(folder, **options)
    figures = {"CPU seconds": time.process_time() - start}
    if side is ours:
        files = loaded.report.facts["streaming"]["files"].values()
        figures["MiB read by a rank"] = sum(file["bytes_read"] for file in files) / _MIB
    yield "load", figures


def _sides(names: tuple[str, ...], **options: Any) -> dict[str, Any]:
    return {name: partial(load, side=_SIDES[name], **options) for name in names}


_SIDES = {
    "llmload": ours,
    "from_pretrained": theirs,
    "accelerate": by_accelerate,
    "HuggingFaceStorageReader": by_torch,
}
_OF_ANY = ("llmload", "from_pretrained", "accelerate")
_IMPORTS = (
    "accelerate.utils.fsdp_utils",
    "llmload_fsdp.session",
    "packaging.requirements",
    "torch.distributed.checkpoint",
    "transformers.distributed",
    "transformers.models.mixtral.modeling_mixtral",
)
_OF_EXPERTS = {
    "checkpoint": experts,
    "sizes": ("0.5B",),
    "target": "peak RSS at most 1.05x a rank's part",
    "imports": _IMPORTS,
    "prepare": join,
    "ranks": 2,
}
CASES = {
    "dense": Case(
        title="dense, 2 ranks",
        sides=_sides((*_OF_ANY, "HuggingFaceStorageReader")),
        target="at parity with from_pretrained",
        final=partial(part_mib, ranks=2),
        sizes=("1.1B",),
        imports=_IMPORTS,
        prepare=join,
        ranks=2,
    ),
    "experts": Case(
        title="merged experts, 2 ranks",
        sides=_sides(_OF_ANY),
        final=partial(part_mib, ranks=2),
        **_OF_EXPERTS,
    ),
    "experts-float32": Case(
        title="merged experts cast to float32, 2 ranks",
        sides=_sides(_OF_ANY, dtype="float32"),
        final=lambda folder: 2 * part_mib(folder, ranks=2),
        **_OF_EXPERTS,
    ),
}
