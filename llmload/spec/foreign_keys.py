"""What other tools call our keys, so that their users are answered with ours.

Looked up only for keys and values that nothing here knows: a plugin may use any of these names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from llmload.spec.yaml_write import dump_inline

_SHOWN: Final = 60
"""Characters of a value that a fix repeats."""


class _Removal(Enum):
    """Instead of a value: why there is nothing to write."""

    DEFAULT = "Remove it: that is what happens without it."
    UNKNOWN = "Remove it: llmload has no such setting."


@dataclass(frozen=True)
class Spelling:
    """One key of other tools, and what to write here."""

    tools: str
    """Whose key it is, as read in a sentence."""
    ours: str = ""
    """Our dotted key; empty where there is none."""
    convert: Callable[[Any], Any] = lambda value: value
    """Their value -> ours."""
    instead: str = ""
    """What to do where no key of ours is the same, in one sentence."""

    def fix(self, value: object) -> str:
        """Return what to do instead of writing their key with ``value``, in one sentence."""
        if self.instead:
            return self.instead
        value = self.convert(value)
        if isinstance(value, _Removal):
            return value.value
        text = dump_inline(value)
        *sections, key = self.ours.split(".")
        text = f"{key}: {text if len(text) <= _SHOWN else '...'}"
        for section in reversed(sections):
            text = f"{section}: {{{text}}}"
        return f"Write `{text}`."


def _switch(on: object) -> Callable[[Any], Any]:
    """Their true is ``on`` here; their false or null needs no key."""
    return lambda value: on if value else _Removal.DEFAULT


def _words(names: Mapping[str, str]) -> Callable[[Any], Any]:
    return lambda value: names.get(value, value) if isinstance(value, str) else value


def _listed(value: object) -> object:
    """Split a list that is written as text with commas."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _targets(value: object) -> object:
    return "all-linear" if value in ("all", ["all"]) else _listed(value)


def _is_lora(value: object) -> object:
    if value in ("lora", "qlora"):
        return {}
    return _Removal.DEFAULT if value in ("full", None) else _Removal.UNKNOWN


_CLASSES: Final = {
    "AutoModelForCausalLM": "causal_lm",
    "AutoModelForSeq2SeqLM": "seq2seq_lm",
    "AutoModelForSequenceClassification": "sequence_classification",
    "AutoModelForTokenClassification": "token_classification",
    "AutoModel": "base",
    "SEQ_2_SEQ_LM": "seq2seq_lm",
    "SEQ_CLS": "sequence_classification",
    "TOKEN_CLS": "token_classification",
    "FEATURE_EXTRACTION": "base",
}
_DTYPES: Final = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "torch.bfloat16": "bfloat16",
    "torch.float16": "float16",
    "torch.half": "float16",
    "torch.float32": "float32",
}
_ATTENTION: Final = {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "disabled": "eager"}

VALUES: Final[Mapping[str, str]] = {
    **{theirs.lower(): ours for theirs, ours in {**_CLASSES, **_DTYPES}.items()},
    "causal": "causal_lm",
    "seq2seq": "seq2seq_lm",
    "all": "all-linear",
}
"""Words of other tools in lower case -> ours, for keys that take one of a few words."""

_EXTRA_TOKENS: Final = "tokenizer.add_special_tokens.additional_special_tokens"
_ALL_LORA: Final = "PEFT, TRL, axolotl and LLaMA-Factory"
_TOKEN: Final = "Remove it and set the environment variable HF_TOKEN: a spec holds no secrets."
_TRAINER: Final = "Remove it and give it to the trainer: llmload only loads the model."
_MIXED: Final = "Write `dtype: {}` for the weights; mixed precision belongs to the trainer."

_CORE: Final = {
    "model_name_or_path": Spelling("TRL, LLaMA-Factory and DeepSpeed-Chat", "model"),
    "pretrained_model_name_or_path": Spelling("transformers", "model"),
    "model_name": Spelling("unsloth", "model"),
    "base_model": Spelling("axolotl", "model"),
    "pretrain": Spelling("ColossalChat", "model"),
    "model_id_or_path": Spelling("ms-swift", "model"),
    "model_revision": Spelling("TRL and LLaMA-Factory", "revision"),
    "revision_of_model": Spelling("axolotl", "revision"),
    "model_type": Spelling("axolotl", "auto_class", _words(_CLASSES)),
    "type_of_model": Spelling("axolotl", "auto_class", _words(_CLASSES)),
    "task_type": Spelling(
        "PEFT and ms-swift", "auto_class", _words({**_CLASSES, "CAUSAL_LM": "causal_lm"})
    ),
    "torch_dtype": Spelling("transformers, TRL and ms-swift", "dtype", _words(_DTYPES)),
    "infer_dtype": Spelling("LLaMA-Factory", "dtype", _words(_DTYPES)),
    "mixed_precision": Spelling("ColossalChat", "dtype", _words(_DTYPES)),
    "policy_dtype": Spelling("the DPO reference code", "dtype", _words(_DTYPES)),
    "reference_dtype": Spelling("the DPO reference code", "dtype", _words(_DTYPES)),
    "bf16": Spelling("transformers' trainer and axolotl", instead=_MIXED.format("bfloat16")),
    "fp16": Spelling("transformers' trainer and axolotl", instead=_MIXED.format("float16")),
    "bfloat16": Spelling("axolotl", "dtype", _switch("bfloat16")),
    "float16": Spelling("axolotl", "dtype", _switch("float16")),
    "pure_bf16": Spelling("LLaMA-Factory", "dtype", _switch("bfloat16")),
    "train_from_scratch": Spelling("LLaMA-Factory", "weights", _switch("random")),
    "reinit_weights": Spelling("axolotl", "weights", _switch("random")),
    "local_dirs": Spelling("the DPO reference code", "cache_dir"),
    "key_mapping": Spelling("transformers", "key_map"),
    "archive": Spelling("the DPO reference code", "weights_from"),
    "flash_attn": Spelling("LLaMA-Factory", "attn_implementation", _words(_ATTENTION)),
    "attn_impl": Spelling("ms-swift", "attn_implementation"),
    "flash_attention": Spelling("axolotl", "attn_implementation", _switch("flash_attention_2")),
    "use_flash_attention_2": Spelling(
        "transformers and TRL", "attn_implementation", _switch("flash_attention_2")
    ),
    "use_flash_attn": Spelling("ColossalChat", "attn_implementation", _switch("flash_attention_2")),
    "sdp_attention": Spelling("axolotl", "attn_implementation", _switch("sdpa")),
    "flex_attention": Spelling("axolotl", "attn_implementation", _switch("flex_attention")),
    "eager_attention": Spelling("axolotl", "attn_implementation", _switch("eager")),
}

_SECTIONS: Final = {
    # tokenizer and embeddings
    "pad_token": Spelling("TRL", "tokenizer.pad_token"),
    "eos_token": Spelling("TRL", "tokenizer.add_special_tokens.eos_token"),
    "padding_side": Spelling("transformers", "tokenizer.padding_side"),
    "chat_template": Spelling("axolotl", "tokenizer.chat_template"),
    "chat_template_path": Spelling("TRL", "tokenizer.chat_template"),
    "chat_template_jinja": Spelling("axolotl", "tokenizer.chat_template"),
    "tokens": Spelling("axolotl", "tokenizer.add_tokens"),
    "add_tokens": Spelling("LLaMA-Factory", "tokenizer.add_tokens", _listed),
    "new_special_tokens": Spelling("LLaMA-Factory and ms-swift", _EXTRA_TOKENS, _listed),
    "add_special_tokens": Spelling("LLaMA-Factory", _EXTRA_TOKENS, _listed),
    "special_tokens": Spelling("axolotl", "tokenizer.add_special_tokens"),
    "use_fast_tokenizer": Spelling("LLaMA-Factory", "tokenizer.use_fast"),
    "tokenizer_use_fast": Spelling("axolotl", "tokenizer.use_fast"),
    "tokenizer_name_or_path": Spelling("the DPO reference code", "tokenizer.name_or_path"),
    "tokenizer_config": Spelling("axolotl", "tokenizer.name_or_path"),
    "resize_vocab": Spelling("LLaMA-Factory", "embeddings", _switch({})),
    "resize_token_embeddings_to_32x": Spelling(
        "axolotl", "embeddings.pad_to_multiple_of", _switch(32)
    ),
    "shrink_embeddings": Spelling("axolotl", "embeddings.allow_shrink"),
    "mean_resizing_embeddings": Spelling("axolotl", "embeddings.init_new", _switch("mean")),
    # dropout and gradient checkpointing
    "disable_dropout": Spelling("TRL and DeepSpeed-Chat", "dropout.p", _switch(0.0)),
    "use_gradient_checkpointing": Spelling("unsloth", "gradient_checkpointing", _switch({})),
    "grad_checkpoint": Spelling("ColossalChat", "gradient_checkpointing", _switch({})),
    "gradient_checkpointing_kwargs": Spelling("TRL and axolotl", "gradient_checkpointing"),
    "use_reentrant_gc": Spelling("LLaMA-Factory", "gradient_checkpointing.use_reentrant"),
    # lora
    "use_peft": Spelling("TRL", "lora", _switch({})),
    "peft_config": Spelling("TRL", "lora"),
    "lora_config": Spelling("ColossalChat", "lora"),
    "adapter": Spelling("axolotl", "lora", _is_lora),
    "finetuning_type": Spelling("LLaMA-Factory", "lora", _is_lora),
    "tuner_type": Spelling("ms-swift", "lora", _is_lora),
    "train_type": Spelling("ms-swift", "lora", _is_lora),
    "adapter_name_or_path": Spelling("LLaMA-Factory", "lora.adapter"),
    "lora_model_dir": Spelling("axolotl", "lora.adapter"),
    "r": Spelling("PEFT", "lora.r"),
    "lora_r": Spelling("TRL and axolotl", "lora.r"),
    "lora_rank": Spelling("LLaMA-Factory, ms-swift and ColossalChat", "lora.r"),
    "lora_dim": Spelling("DeepSpeed-Chat", "lora.r"),
    "lora.rank": Spelling("LLaMA-Factory and ms-swift", "lora.r"),
    "lora_alpha": Spelling(_ALL_LORA, "lora.lora_alpha"),
    "lora.alpha": Spelling("PEFT's papers", "lora.lora_alpha"),
    "lora_dropout": Spelling(_ALL_LORA, "lora.lora_dropout"),
    "lora.dropout": Spelling("PEFT's papers", "lora.lora_dropout"),
    "lora_target": Spelling("LLaMA-Factory", "lora.target_modules", _targets),
    "lora_target_modules": Spelling("TRL and axolotl", "lora.target_modules", _targets),
    "lora_target_linear": Spelling("axolotl", "lora.target_modules", _switch("all-linear")),
    "lora_module_name": Spelling("DeepSpeed-Chat", "lora.target_modules", _targets),
    "target_modules": Spelling("PEFT and ms-swift", "lora.target_modules", _targets),
    "lora_target_parameters": Spelling("TRL and axolotl", "lora.target_parameters"),
    "additional_target": Spelling("LLaMA-Factory", "lora.modules_to_save", _listed),
    "lora_modules_to_save": Spelling("TRL and axolotl", "lora.modules_to_save"),
    "modules_to_save": Spelling("PEFT and ms-swift", "lora.modules_to_save"),
    "lora_train_bias": Spelling("ColossalChat", "lora.bias"),
    "lora_dtype": Spelling("ms-swift", "lora.adapter_dtype", _words(_DTYPES)),
    "peft_ensure_weight_tying": Spelling("axolotl", "lora.ensure_weight_tying"),
    "lora_fan_in_fan_out": Spelling("axolotl", "lora.fan_in_fan_out"),
    "use_rslora": Spelling("TRL and LLaMA-Factory", "lora.use_rslora"),
    "peft_use_rslora": Spelling("axolotl", "lora.use_rslora"),
    "use_dora": Spelling("TRL and LLaMA-Factory", "lora.use_dora"),
    "peft_use_dora": Spelling("axolotl", "lora.use_dora"),
    "pissa_init": Spelling("LLaMA-Factory", "lora.init_lora_weights", _switch("pissa")),
    "init_lora_weights": Spelling("PEFT", "lora.init_lora_weights"),
    "init_weights": Spelling("ms-swift", "lora.init_lora_weights"),
    "peft_init_lora_weights": Spelling("axolotl", "lora.init_lora_weights"),
    "peft_layers_to_transform": Spelling("axolotl", "lora.layers_to_transform"),
    "peft_layers_pattern": Spelling("axolotl", "lora.layers_pattern"),
    "peft_layer_replication": Spelling("axolotl", "lora.layer_replication"),
    "peft_trainable_token_indices": Spelling("axolotl", "lora.trainable_token_indices"),
    # kbit
    "load_in_4bit": Spelling("transformers, TRL and axolotl", "kbit.bits", _switch(4)),
    "load_in_8bit": Spelling("transformers, TRL and axolotl", "kbit.bits", _switch(8)),
    "quantization_bit": Spelling("LLaMA-Factory", "kbit.bits"),
    "quant_bits": Spelling("ms-swift", "kbit.bits"),
    "quantization_type": Spelling("LLaMA-Factory", "kbit.quant_type"),
    "bnb_4bit_quant_type": Spelling("transformers and TRL", "kbit.quant_type"),
    "double_quantization": Spelling("LLaMA-Factory", "kbit.double_quant"),
    "use_bnb_nested_quant": Spelling("TRL", "kbit.double_quant"),
    "bnb_4bit_use_double_quant": Spelling("transformers and ms-swift", "kbit.double_quant"),
    "bnb_4bit_compute_dtype": Spelling(
        "transformers and ms-swift", "kbit.compute_dtype", _words(_DTYPES)
    ),
    "bnb_4bit_quant_storage": Spelling(
        "transformers and TRL", "kbit.quant_storage", _words(_DTYPES)
    ),
    "quantization_config": Spelling("transformers", instead="Write `kbit: {bits: 4}`."),
    "bnb_config_kwargs": Spelling("axolotl", instead="Write its settings into `kbit`."),
    # zero3
    "deepspeed": Spelling("transformers, axolotl and LLaMA-Factory", "zero3.config"),
    "ds_config": Spelling("DeepSpeed-Chat", "zero3.config"),
    "zero_stage": Spelling(
        "DeepSpeed-Chat",
        "zero3.config",
        lambda stage: {"zero_optimization": {"stage": stage}},
    ),
}

_WITHOUT_COUNTERPART: Final = {
    **dict.fromkeys(
        ("token", "use_auth_token", "hub_token", "hf_token"),
        Spelling("transformers", instead=_TOKEN),
    ),
    "hf_hub_token": Spelling("LLaMA-Factory", instead=_TOKEN),
    "hf_use_auth_token": Spelling("axolotl", instead=_TOKEN),
    "low_cpu_mem_usage": Spelling(
        "transformers and LLaMA-Factory", instead="Remove it: no weight is ever held twice."
    ),
    "ignore_mismatched_sizes": Spelling(
        "transformers",
        instead="Remove it: a tensor of another shape is always an error; to leave it out, name"
        " it in `strict`.",
    ),
    "use_safetensors": Spelling(
        "transformers", instead="Remove it: pickled weights need `allow_pickle: true`."
    ),
    "output_loading_info": Spelling(
        "transformers", instead="Remove it: the report always says what was loaded."
    ),
    **dict.fromkeys(
        (
            "beta", "cutoff_len", "dataset", "dataset_dir", "dataset_name", "datasets", "do_train",
            "eval_steps", "fsdp", "fsdp_config", "gradient_accumulation_steps", "learning_rate",
            "logging_steps", "lr_scheduler", "lr_scheduler_type", "max_grad_norm", "max_length",
            "max_seq_length", "max_steps", "micro_batch_size", "num_epochs", "num_train_epochs",
            "optim", "optimizer", "output_dir", "overwrite_output_dir", "packing",
            "per_device_eval_batch_size", "per_device_train_batch_size", "plot_loss", "report_to",
            "sample_packing", "save_steps", "seed", "sequence_len", "stage", "template", "tf32",
            "val_set_size", "wandb_project", "warmup_ratio", "warmup_steps", "weight_decay",
        ),
        Spelling("training scripts", instead=_TRAINER),
    ),
}  # fmt: skip

SPELLINGS: Final[Mapping[str, Spelling]] = {**_CORE, **_SECTIONS, **_WITHOUT_COUNTERPART}
"""Their key, or dotted path, in a spec -> what to write here."""
