"""Sound folders in which one value of one small file is another: every key, each strange value.

The rows of ``corpus.py`` were thought of one by one; these are all there are of their kind, for
several model types, and are measured by ``limits.py`` alone: the quick tests take some.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from corpus import Row, written

STRANGE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 2**31, 10**9, 10**30, -(10**30), 1e308, 0.5),
    *(float("nan"), float("inf"), "", "x", "auto", "x" * 20_000, "../../etc/passwd", "org/repo"),
    *("\ud800", "a\0b", [], [1], ["x"], [None] * 3, [[[]]], {}, {"": None}, {"x": {"y": 1}}),
    *({"rope_type": "x"}, {"class": "evil"}),
)
DEPTH = 3
"""How far down the keys of a file are looked at."""

Path_ = tuple[str | int, ...]


def model_types(place: Path) -> dict[str, Path]:
    """Make a folder, without a tokenizer, of some widely used model types beside Llama."""
    import transformers

    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
    }
    configs = {
        "gpt2": transformers.GPT2Config(
            n_embd=16, n_head=2, n_layer=2, vocab_size=64, n_positions=32
        ),
        "mixtral": transformers.MixtralConfig(**small, num_local_experts=2),
        "gemma2": transformers.Gemma2Config(**small, head_dim=8),
        "qwen2": transformers.Qwen2Config(**small),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(place / name)
    return {name: place / name for name in configs}


def rows(sound: Path) -> Iterator[Row]:
    """All rows of a folder: each file of JSON, each key, one that is new, each strange value."""
    for file in sorted(sound.rglob("*.json")):
        name = str(file.relative_to(sound))
        content = json.loads(file.read_text())
        spec = {"lora": {"adapter": "{folder}/adapter"}} if name.startswith("adapter") else {}
        for where in (*_keys(content, DEPTH), ("new_key",)):
            for value in STRANGE:
                changed = written(name, json.dumps(_with(content, where, value)))
                yield Row(f"{name}: {'.'.join(map(str, where))}", changed, "", spec)


def _keys(value: Any, depth: int, above: Path_ = ()) -> Iterator[Path_]:
    """Every key down to a depth; of the items of a list the first two."""
    if not depth:
        return
    found: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        found = list(value.items())[:60]
    elif isinstance(value, list):
        found = list(enumerate(value))[:2]
    for key, below in found:
        yield (*above, key)
        yield from _keys(below, depth - 1, (*above, key))


def _with(content: Any, where: Path_, value: Any) -> Any:
    changed = json.loads(json.dumps(content))
    at = changed
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    return changed
