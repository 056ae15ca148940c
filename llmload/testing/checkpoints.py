"""Tiny real checkpoint folders: seeded weights, a real fast tokenizer, readable by transformers.

Every function returns either a model in memory or a folder; nothing here touches a network. The
same seed gives the same weights on every machine of one torch version.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from llmload.spec.words import AUTO_CLASSES
from llmload.testing.shrinking import VOCABULARY, tiny_config

IDS = torch.arange(24).view(2, 12)
"""A batch of two texts of twelve tokens."""

SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "a model is loaded in a dozen fragile steps",
    "every parameter is equal to the checkpoint or it is listed as new",
    "no rank ever holds more than its own share plus one tensor",
    "plugins decide what happens and the plan says so before it does",
)

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "bert": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "t5": {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4},
}


def tiny_tokenizer(*, pad: bool = False, vocab_size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Train a word-level tokenizer on ``SENTENCES``: ids 0 to 2 are ``<unk>``, ``<s>``, ``</s>``.

    With ``pad`` the token ``<pad>`` has id 3; without it the tokenizer has no pad token at all, as
    Llama's and GPT-2's have none.
    """
    special = ["<unk>", "<s>", "</s>"] + (["<pad>"] if pad else [])
    raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.train_from_iterator(
        SENTENCES, trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>" if pad else None,
        model_max_length=64,
        # transformers 4.51 would give token_type_ids too, which few of these models take.
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_model(
    model_type: str = "llama",
    *,
    auto_class: str = "causal_lm",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: Any,
) -> PreTrainedModel:
    """Build a model with seeded weights in memory; the caller's random stream does not move.

    ``llama``, ``gpt2``, ``opt``, ``bert`` and ``t5`` have two layers of hidden size 16, and these
    sizes stay. Any other type that transformers knows is shrunk by :func:`tiny_config`, which does
    what can be done without knowing the type. All but Llama keep their default dropout.

    :param model_type: as in a ``config.json``.
    :param auto_class: which class, as in a spec: ``causal_lm``, ``base``, ``seq2seq_lm``, ...
    :param config: overrides any config field.
    :raises ValueError: transformers has no such type, or no such class of it.
    """
    auto = getattr(transformers, AUTO_CLASSES[auto_class].transformers)
    made = _config(model_type, auto_class, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(made).to(dtype)


def _config(model_type: str, auto_class: str, fields: dict[str, Any]) -> PretrainedConfig:
    if model_type not in _CONFIGS:
        made = tiny_config(model_type, **fields)
        if auto_class == "causal_lm" and hasattr(made, "is_decoder"):
            made.is_decoder = fields.get("is_decoder", True)
        return made
    known = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    known |= _CONFIGS[model_type]
    if model_type in ("t5", "bert"):
        known["pad_token_id"] = 3
    if model_type == "t5":
        known["decoder_start_token_id"] = 3
    return AutoConfig.for_model(model_type, **(known | fields))


def save_checkpoint(
    model: PreTrainedModel,
    folder: Path,
    *,
    shards: int = 1,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Save ``model`` (and ``tokenizer``) as an ordinary folder, in ``shards`` or more files."""
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=size + 1 if shards == 1 else size // shards)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def tiny_checkpoint(
    folder: Path,
    model_type: str = "llama",
    *,
    auto_class: str = "causal_lm",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shards: int = 1,
    pad: bool = False,
    chat_template: str | None = None,
    **config: Any,
) -> Path:
    """Make a tiny model with its tokenizer and save both to ``folder``; returns ``folder``.

    :param model_type: and ``auto_class``, ``dtype``, ``seed``: as :func:`tiny_model` takes them.
    :param shards: into how many files of weights, at least.
    :param pad: whether the tokenizer has a pad token.
    :param config: overrides any config field.
    """
    tokenizer = tiny_tokenizer(pad=pad)
    tokenizer.chat_template = chat_template
    model = tiny_model(model_type, auto_class=auto_class, dtype=dtype, seed=seed, **config)
    return save_checkpoint(model, folder, shards=shards, tokenizer=tokenizer)


def tiny_llama(
    tmp_path: Path,
    *,
    name: str = "llama",
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shards: int = 1,
    pad: bool = False,
    **config: Any,
) -> Path:
    """Save a two-layer Llama of hidden size 16 and 128 tokens to ``tmp_path / name``."""
    return tiny_checkpoint(
        tmp_path / name,
        "llama",
        dtype=dtype,
        seed=seed,
        shards=shards,
        pad=pad,
        tie_word_embeddings=tied,
        **config,
    )


def edit_config(folder: Path, **fields: Any) -> Path:
    """Change fields of ``config.json`` in a saved folder; returns ``folder``."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def losses(model: Any, steps: int) -> list[float]:
    """Train on ``IDS`` with a fixed seed, dropout on, and return the loss of each step.

    For any model with a language-model loss: two that are equal give equal numbers.
    """
    torch.manual_seed(11)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found
