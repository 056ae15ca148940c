"""Checkpoint folders of real shapes with seeded random weights, made once and kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

SHARDS = 4


@dataclass(frozen=True)
class Size:
    """A Llama of about so many parameters."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000


SIZES = {
    "0.1B": Size(768, 12, 2048, 12, 12),
    "0.5B": Size(1536, 14, 4096, 24, 8),
    "1.1B": Size(2048, 22, 5632, 32, 4),
    "3B": Size(3072, 24, 8192, 24, 8),
    "7B": Size(4096, 32, 11008, 32, 32),
    "8B": Size(4096, 32, 14336, 32, 8, 128256),
}


def folder(root: Path, size: str, dtype: str = "bfloat16") -> Path:
    """Return the folder of a Llama of ``size`` at ``dtype``, making it if it is not there yet.

    Weights are normal with standard deviation 0.02, as in a fresh Llama, written shard by shard so
    that making a large one takes little memory.
    """
    made = root / f"llama-{size}-{dtype}"
    if not (made / "config.json").is_file():
        _make(made, SIZES[size], dtype)
    return made


def _make(made: Path, size: Size, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        intermediate_size=size.intermediate,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    made.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = {
            n: p.shape for n, p in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    names = list(shapes)
    per_shard = -(-len(names) // SHARDS)
    weight_map: dict[str, str] = {}
    total = 0
    generator = torch.Generator().manual_seed(0)
    for number in range(SHARDS):
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        tensors = {}
        for name in names[number * per_shard : (number + 1) * per_shard]:
            tensor = torch.empty(shapes[name], dtype=torch.float32)
            tensor.normal_(0, 0.02, generator=generator)
            tensors[name] = tensor.to(getattr(torch, dtype))
            weight_map[name] = file
            total += tensors[name].nbytes
        save_file(tensors, made / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(made)
