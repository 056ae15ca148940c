"""Configs of any architecture that the installed transformers knows, shrunk without knowing it.

One generic shrinker walks the default config and its sub-configs and replaces the size fields that
``SIZES`` names; ``OVERRIDES`` holds what a few types need beside that. No network.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 128
"""Rows of the embedding of every tiny model, and the upper bound of the tokenizer's vocabulary."""

HEADS = 4

SIZES: tuple[tuple[str, int], ...] = (
    # The first pattern that matches the whole name wins. Hidden 32 = 4 heads of 8.
    (r"(?:\w+_)?vocab_size\w*", VOCABULARY),
    (r"mamba_d_head|qk_head_dim|attention_head_dim", 16),
    (r"mamba_d_ssm|attention_hidden_size", 64),
    (r"(?:mamba_d_state|state_size)", 8),
    (r"rotary_dim", 8),
    (
        r"(?:\w+_)?(?:head_dim|d_kv|d_head|dim_head|head_size|attention_head_size"
        r"|kv_channels)",
        8,
    ),
    (r"(?:qk_nope|qk_rope|v|index|linear_key|linear_value|linear|swa|swa_v)_head_dim", 8),
    (r"(?:q|kv|o|\w+)_lora_rank", 8),
    (r"(?:\w+_)?num_(?:key_value|query)_heads|(?:\w+_)?num_kv_heads|kv_n_heads|n_kv_heads", 2),
    (r"(?:\w+_)?num_key_value_groups|num_attention_groups", 2),
    (
        r"(?:\w+_)?(?:num_attention_heads|attention_heads|num_heads|n_heads?|n_head"
        r"|num_\w+_attention_heads|num_\w+_heads)",
        HEADS,
    ),
    (
        r"(?:\w+_)?(?:num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers"
        r"|num_\w+_layers)",
        2,
    ),
    (r"(?:\w+_)?(?:intermediate_size|ffn_dim|d_ff|dim_ff|n_inner|d_inner|ffn_hidden_size)\w*", 48),
    (
        r"(?:\w+_)?(?:hidden_size|d_model|n_embd|embed_dim|emb_dim|model_dim|dim_model"
        r"|embedding_size|hidden_dim|hidden_size_global|base_channels|word_embed_proj_dim|projection_dim|lru_width|dim|true_hidden_size|intra_bottleneck_size)",
        32,
    ),
    (r"(?:num|n_routed|moe_num|num_local|n_zero)_experts|num_\w+_experts|n_zero_expert_num", 4),
    (r"num_experts_per_tok\w*|moe_top_?k|top_k_experts|num_selected_experts|moe_k", 2),
    (r"(?:n_group|topk_group|n_groups|mamba_n_?groups)", 1),
    (r"max_position_embeddings|max_sequence_length|n_positions|max_\w+_positions|n_ctx", 64),
    (r"(?:\w+_)?chunk_size", 8),
    (r"(?:sliding|attention|attention_chunk)_window|sliding_window_size", 8),
)
"""Size fields of configs: pattern of the whole field name, tiny value."""

_HYBRID = {"num_hidden_layers": 4}
_NO_KERNELS = {"use_mamba_kernels": False}
_LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_QWEN4 = _HYBRID | {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _LINEAR_THEN_FULL,
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"use_cache": False, "encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "ctrl": {"dff": 48},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}},
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 3},
    "falcon_h1": {"mamba_d_head": 16},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": 48},
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "funnel": {"architectures": ["FunnelModel"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _LINEAR_THEN_FULL,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"num_hidden_layers": 4, "attn_layer_offset": 2, "attn_layer_period": 4} | _NO_KERNELS,
    "kimi_linear": _LINEAR_THEN_FULL,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"num_hidden_layers": 3},
    "longcat_flash": {"expert_ffn_hidden_size": 48, "zero_expert_num": 2},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": 8},
    "neomme": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen3_5": {"text_config": _HYBRID},
    "qwen3_5_moe": {"text_config": _HYBRID},
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_embds_dim": [8, 24],
        "axial_pos_shape": [2, 4],
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
        "attn_layers": ["local", "lsh"],
    },
    "vibevoice_asr": {
        "acoustic_tokenizer_chunk_size": 3200,
        "acoustic_tokenizer_encoder_config": {"num_filters": 2, "depths": [1] * 7},
        "semantic_tokenizer_encoder_config": {"num_filters": 2, "depths": [1] * 7},
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3}
    | _NO_KERNELS,
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3},
}
"""Further config fields, by model type, for what the generic sizes make inconsistent."""


def tiny_config(model_type: str, **fields: Any) -> PretrainedConfig:
    """Make the default config of ``model_type`` with every known size shrunk.

    :param fields: win over what is shrunk; a dict of them reaches into a sub-config.
    :raises ValueError: the installed transformers has no such type.
    """
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"transformers {transformers.__version__} has no model type {model_type!r}"
        )
    return _shrunk(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}) | fields)


def _shrunk(config_class: type[PretrainedConfig], fields: Mapping[str, Any]) -> PretrainedConfig:
    """Make ``config_class`` small; ``fields`` win, and a dict of them reaches into a sub-config."""
    default = vars(config_class())
    heads = {default[name] for name in default if _size(name) == HEADS}
    small: dict[str, Any] = {}
    for name, value in default.items():
        if isinstance(value, PretrainedConfig):
            small[name] = _shrunk(type(value), fields.get(name, {})).to_dict()
        elif name in fields or isinstance(value, bool):
            continue
        elif re.fullmatch(r"\w+_token_(?:id|index)", name) and value is not None:
            small[name] = _token_id(value)
        elif isinstance(value, int) and (size := _size(name)) is not None:
            # As many key and value heads as heads stays so: such types often have one projection.
            small[name] = min(HEADS if _is_kv(name) and value in heads else size, value)
    return config_class(**{**fields, **small})


def _token_id(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_token_id(item) for item in value]
    return value % VOCABULARY if isinstance(value, int) and value >= 0 else value


def _is_kv(name: str) -> bool:
    return "key_value_heads" in name or "kv" in name


@functools.cache
def _size(name: str) -> int | None:
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
