"""What other tools call our keys, so that their users are answered with ours.

Looked up only for keys and values that nothing here knows: a plugin may use any of these names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, get_args

from llmload.spec import training_keys
from llmload.spec.words import AUTO_CLASSES, Dtype
from llmload.spec.yaml_write import dump_inline

_SHOWN: Final = 500
"""Characters of a value that a fix repeats."""
HIDDEN: Final = object()
"""Stands for a value that no message shows."""


class Removal(Enum):
    """Instead of a value: why there is nothing to write."""

    DEFAULT = "Remove it: that is what happens without it."
    UNKNOWN = "Remove it: llmload has no such setting."


@dataclass(frozen=True)
class Keys:
    """Instead of a value: what is to be written where one key of ours is not enough."""

    keys: Mapping[str, Any]
    """Our top-level keys, with their values."""


@dataclass(frozen=True)
class Sentence:
    """Instead of a value: what to do, in one sentence."""

    text: str


@dataclass(frozen=True)
class Spelling:
    """One key of other tools, and what to write here."""

    tools: str
    """Whose key it is, as read in a sentence."""
    ours: str = ""
    """Our dotted key; empty where there is none."""
    convert: Callable[[Any], Any] = lambda value: value
    """Their value -> ours, or a :class:`Removal`, :class:`Keys` or :class:`Sentence`. Never asked
    for null, which asks for what happens without the key."""
    instead: str = ""
    """What to do where no key of ours is the same, in one sentence."""

    def fix(self, value: object) -> str:
        """Return what to do instead of writing their key with ``value``, in one sentence."""
        if value is HIDDEN and self.ours and not self.instead:
            return self._moved()
        found = self.answer(value)
        if isinstance(found, Removal):
            return str(found.value)
        if isinstance(found, Sentence):
            return found.text
        written = [f"{key}: {dump_inline(part)}" for key, part in found.keys.items()]
        if sum(map(len, written)) > _SHOWN:
            return self._moved()
        return f"Write {' and '.join(f'`{text}`' for text in written)}."

    def answer(self, value: object) -> Keys | Removal | Sentence:
        """Return what their key with ``value`` is here: our keys, nothing, or what else to do."""
        if self.instead:
            return Sentence(self.instead)
        if value is None:
            return Removal.DEFAULT
        found = self.convert(value)
        if isinstance(found, Keys | Removal | Sentence):
            return found
        return Keys(self._nested(found))

    def _nested(self, value: object) -> Mapping[str, Any]:
        """Return our key with a value, as a spec has it."""
        for key in reversed(self.ours.split(".")):
            value = {key: value}
        assert isinstance(value, dict)
        return value

    def _moved(self) -> str:
        *sections, key = self.ours.split(".")
        place = f" in `{'.'.join(sections)}`" if sections else ""
        return f"Give its value to the key `{key}`{place}."


def switch(on: object) -> Callable[[Any], Any]:
    """Their true is ``on`` here; their false needs no key."""
    return lambda value: on if value else Removal.DEFAULT


def words(names: Mapping[str, str]) -> Callable[[Any], Any]:
    """Their words for values are ours under other names; what is no such word stays."""
    return lambda value: names.get(value, value) if isinstance(value, str) else value


def listed(value: object) -> object:
    """Split a list that is written as text with commas."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _class(value: object) -> object:
    """Classes by name; in ms-swift and others the same key holds the type of the model."""
    if not isinstance(value, str):
        return Removal.UNKNOWN
    if value in _CLASSES:
        return _CLASSES[value]
    if value[:1].isupper() and value.isidentifier() and not value.startswith("Auto"):
        return f"transformers:{value}"
    if value.islower():
        return Sentence("Remove it: the type of the model stands in its config.json.")
    return Sentence("Write `auto_class: module:Class` with the class that is to be loaded.")


def _task(value: object) -> object:
    return _CLASSES.get(str(value).upper(), Removal.UNKNOWN)


def _labels(value: object) -> object:
    return (
        value
        if type(value) is int and value > 0
        else Sentence("Remove it, or write how many in `labels`.")
    )


def _dtype(value: object) -> object:
    """dtypes in the spellings of torch and of trainers."""
    allowed = ("auto", *get_args(Dtype))
    if value in ("no", False):
        return Removal.DEFAULT
    found = DTYPE_WORDS.get(str(value).lower(), value)
    return (
        found if found in allowed else Sentence(f"Write `dtype` with one of {', '.join(allowed)}.")
    )


def _attention(value: object) -> object:
    return Removal.DEFAULT if value == "auto" else _ATTENTION.get(str(value), value)


def _own_attention(value: object) -> object:
    """axolotl's names for kernels of its own stand beside those of transformers."""
    return Sentence(_PATCH) if value in ("fp8", "s2", "sage", "xformers") else value


def _reward_model(value: object) -> object:
    """Of axolotl a switch, of LLaMA-Factory another model."""
    if not isinstance(value, bool):
        return Sentence(_OTHER_MODEL)
    return (
        Keys({"auto_class": "sequence_classification", "labels": 1}) if value else Removal.DEFAULT
    )


def _archive(value: object) -> object:
    return Keys({"weights_from": value, "allow_pickle": True})


_CLASSES: Final = {
    "AutoModelForVision2Seq": "image_text_to_text",
    **{theirs: ours for ours, named in AUTO_CLASSES.items() for theirs in named if theirs},
}
DTYPE_WORDS: Final[Mapping[str, str]] = {
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
_ATTENTION: Final = {
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
    "flash_attn": "flash_attention_2",
    "disabled": "eager",
}

VALUES: Final[Mapping[str, str]] = {
    **{
        theirs.lower(): ours
        for theirs, ours in {**_CLASSES, **DTYPE_WORDS}.items()
        if theirs.lower() != ours
    },
    "causal": "causal_lm",
    "seq2seq": "seq2seq_lm",
    "all": "all-linear",
}
"""Words of other tools in lower case -> ours, for keys that take one of a few words."""

_TOKEN: Final = "Remove it and set the environment variable HF_TOKEN: a spec holds no secrets."
_TRAINER: Final = "Remove it and give it to the trainer: llmload only loads the model."
_PATCH: Final = "Remove it and apply it to `result.model`: what is loaded is not patched."
_OTHER_MODEL: Final = "Remove it: each model has a spec of its own, or is a member of a group."
_FREEZING: Final = (
    "Remove it and set `requires_grad` on `result.model`: `trainable` freezes the whole model."
)
_QUANTISED: Final = (
    "Remove it: a quantised folder says so in its config, and `kbit` quantises any other."
)
_CAST: Final = "Remove it: which modules are in another dtype stands in the section `cast`."
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
    "model_type": Spelling("axolotl", "auto_class", _class),
    "type_of_model": Spelling("axolotl", "auto_class", _class),
    "num_labels": Spelling("transformers and ms-swift", "labels", _labels),
    "task_type": Spelling("PEFT and ms-swift", "auto_class", _task),
    "torch_dtype": Spelling("transformers, TRL and ms-swift", "dtype", _dtype),
    "infer_dtype": Spelling("LLaMA-Factory", "dtype", _dtype),
    "mixed_precision": Spelling("ColossalChat", "dtype", _dtype),
    "policy_dtype": Spelling("the DPO reference code", "dtype", _dtype),
    "reference_dtype": Spelling("the DPO reference code", "dtype", _dtype),
    "bf16": Spelling("transformers' trainer and axolotl", instead=_MIXED.format("bfloat16")),
    "fp16": Spelling("transformers' trainer and axolotl", instead=_MIXED.format("float16")),
    "bfloat16": Spelling("axolotl", "dtype", switch("bfloat16")),
    "float16": Spelling("axolotl", "dtype", switch("float16")),
    "float32": Spelling("axolotl", "dtype", switch("float32")),
    "pure_bf16": Spelling("LLaMA-Factory", "dtype", switch("bfloat16")),
    "train_from_scratch": Spelling("LLaMA-Factory", "weights", switch("random")),
    "reinit_weights": Spelling("axolotl", "weights", switch("random")),
    "local_dirs": Spelling("the DPO reference code", "cache_dir"),
    "key_mapping": Spelling("transformers", "key_map"),
    "archive": Spelling("the DPO reference code", "weights_from", _archive),
    "flash_attn": Spelling("LLaMA-Factory", "attn_implementation", _attention),
    "attn_impl": Spelling("ms-swift", "attn_implementation", _attention),
    "flash_attention": Spelling("axolotl", "attn_implementation", switch("flash_attention_2")),
    "use_flash_attention_2": Spelling(
        "transformers and TRL", "attn_implementation", switch("flash_attention_2")
    ),
    "use_flash_attn": Spelling("ColossalChat", "attn_implementation", switch("flash_attention_2")),
    "sdp_attention": Spelling("axolotl", "attn_implementation", switch("sdpa")),
    "flex_attention": Spelling("axolotl", "attn_implementation", switch("flex_attention")),
    "eager_attention": Spelling("axolotl", "attn_implementation", switch("eager")),
    **dict.fromkeys(("overrides_of_model_config", "model_config"), Spelling("axolotl", "config")),
}

_WITHOUT_COUNTERPART: Final = {
    **dict.fromkeys(
        ("token", "use_auth_token", "hub_token", "hf_token"),
        Spelling("transformers", instead=_TOKEN),
    ),
    **dict.fromkeys(
        ("hf_hub_token", "ms_hub_token", "om_hub_token"),
        Spelling("LLaMA-Factory", instead=_TOKEN),
    ),
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
        ("model_init_kwargs", "overrides_of_model_kwargs"),
        Spelling("TRL and axolotl", instead="Remove it and write its keys beside `model`."),
    ),
    **dict.fromkeys(
        ("tokenizer_type", "processor_type", "cls_model_config", "is_llama_derived_model",
         "is_mistral_derived_model", "is_falcon_derived_model", "is_qwen_derived_model"),
        Spelling("axolotl", instead="Remove it: the folder's files say which class it is."),
    ),
    **dict.fromkeys(
        ("chunked_cross_entropy", "chunked_cross_entropy_num_chunks", "dense_mixer",
         "experts_implementation", "expert_backend", "flash_attn_cross_entropy", "flash_attn_d512",
         "flash_attn_fuse_mlp", "flash_attn_rms_norm", "flex_attn_compile_kwargs",
         "fused_attn_kernel", "gemma4_hybrid_attn_impl", "large_head_attention",
         "liger_cross_entropy", "liger_rms_norm_gated", "liger_use_token_scaling",
         "llama4_linearized_experts", "lora_embedding_kernel", "mora", "sage_attention",
         "scaling_softmax", "sdpa_varlen", "tiled_mlp", "use_dsv4_kernels", "use_glm_dsa_kernels",
         "use_kernels", "use_onebitllms", "use_scattermoe", "use_sonicmoe"),
        Spelling("axolotl", instead=_PATCH),
    ),
    **dict.fromkeys(
        ("plugins", "lora_mlp_kernel", "lora_o_kernel", "lora_qkv_kernel", "s2_attention",
         "xformers_attention", "cut_cross_entropy", "liger_rope", "liger_rms_norm", "liger_swiglu",
         "liger_glu_activation", "liger_fused_linear_cross_entropy", "liger_layer_norm",
         "unsloth_lora_mlp", "unsloth_lora_qkv", "unsloth_lora_o", "unsloth_cross_entropy_loss"),
        Spelling("axolotl", instead=_PATCH),
    ),
    **dict.fromkeys(
        ("enable_liger_kernel", "mixture_of_depths", "shift_attn", "upcast_lmhead_output",
         "kt_config", "use_kt", "use_unsloth", "use_unsloth_gc", "use_v1_kernels"),
        Spelling("LLaMA-Factory", instead=_PATCH),
    ),
    "use_liger_kernel": Spelling("transformers' trainer and TRL", instead=_PATCH),
    **dict.fromkeys(
        ("unfrozen_parameters", "freeze_mm_modules", "spectrum_top_fraction"),
        Spelling("axolotl", instead=_FREEZING),
    ),
    **dict.fromkeys(
        ("use_llama_pro", "freeze_trainable_layers", "freeze_trainable_modules",
         "freeze_extra_modules", "freeze_vision_tower", "freeze_multi_modal_projector",
         "freeze_language_model"),
        Spelling("LLaMA-Factory", instead=_FREEZING),
    ),
    **dict.fromkeys(
        ("ref_model", "reward_model_type", "ref_model_adapters", "ref_model_quantization_bit",
         "reward_model_adapters", "reward_model_quantization_bit"),
        Spelling("LLaMA-Factory", instead=_OTHER_MODEL),
    ),
    "reward_model": Spelling("axolotl and LLaMA-Factory", "auto_class", _reward_model),
    **dict.fromkeys(
        ("reward_model_path", "sft_model_path", "teacher_model_name_or_path",
         "reward_model_name_or_path"),
        Spelling("TRL", instead=_OTHER_MODEL),
    ),
    **dict.fromkeys(
        ("export_dir", "export_size", "export_device", "export_legacy_format",
         "export_hub_model_id"),
        Spelling(
            "LLaMA-Factory",
            instead="Remove it: `llmload save SPEC --set lora.merge=true --to DIR` writes it.",
        ),
    ),
    "rope_scaling": Spelling(
        "LLaMA-Factory",
        instead="Remove it and write its numbers into `config`: none are made of a context length.",
    ),
    **dict.fromkeys(
        ("export_quantization_bit", "export_quantization_dataset", "export_quantization_maxlen",
         "export_quantization_nsamples"),
        Spelling("LLaMA-Factory", instead="Remove it: `llmload save` quantises nothing."),
    ),
    **dict.fromkeys(
        ("gptq", "gptq_disable_exllama", "model_quantization_config",
         "model_quantization_config_kwargs", "quantize_moe_experts"),
        Spelling("axolotl", instead=_QUANTISED),
    ),
    "base_model_config": Spelling(
        "axolotl",
        instead="Remove it: the config is read from the model's folder, and `config` sets keys of"
        " it.",
    ),
    "moe_aux_loss_coef": Spelling(
        "LLaMA-Factory",
        instead="Remove it: it goes into `config`, by the name that the model's config has for it.",
    ),
    "offload_folder": Spelling(
        "LLaMA-Factory", instead="Remove it: no weight is kept on a disk."
    ),
    **dict.fromkeys(
        ("added_tokens_overrides", "init_special_tokens", "module_dropout",
         "new_special_tokens_config", "oft_block_size", "oft_rank", "oft_target",
         "processor_kwargs", "tokenizer_legacy", "tokenizer_save_jinja_files",
         "tokenizer_use_mistral_common"),
        Spelling("axolotl and LLaMA-Factory", instead=Removal.UNKNOWN.value),
    ),
    **dict.fromkeys(
        ("fp32_norms", "fp32_norm_classes"),
        Spelling("axolotl", instead=_CAST),
    ),
    "upcast_layernorm": Spelling("LLaMA-Factory", instead=_CAST),
    "disable_gradient_checkpointing": Spelling(
        "LLaMA-Factory",
        instead="Remove it: nothing is recomputed without the section `gradient_checkpointing`.",
    ),
    **dict.fromkeys(
        ("lora_task_type", "lora_on_cpu", "embeddings_skip_upcast", "quantization_method",
         "use_cache", "split_special_tokens", "base_model_ignore_patterns",
         "experimental_skip_move_to_device", "print_param_status", "qlora_sharded_model_loading",
         "quantization_device_map"),
        Spelling("TRL, axolotl and LLaMA-Factory", instead="Remove it: nothing here needs it."),
    ),
    **dict.fromkeys(training_keys.NAMES, Spelling("training scripts", instead=_TRAINER)),
}  # fmt: skip

SAME_WORDS: Final[Mapping[str, Spelling]] = {
    "strict": Spelling(
        "axolotl",
        instead="Remove it: it holds axolotl's own file to its keys, ours the checkpoint.",
    ),
    "streaming": Spelling("axolotl, LLaMA-Factory and TRL", instead=_TRAINER),  # of the data
    "attn_implementation": Spelling("axolotl", "attn_implementation", _own_attention),
}
"""Keys of other tools that are ours too, and mean something else there."""

SPELLINGS: Final[Mapping[str, Spelling]] = {**_CORE, **_WITHOUT_COUNTERPART}
"""Their key, or dotted path, in a spec -> what to write here, of core keys and of no key at all.
What they call the keys of a section stands in its ``spellings``."""


def is_training(key: str, spelling: Spelling | None) -> bool:
    """Say whether a key of another tool is about training, and not about what is loaded."""
    if spelling is None:
        return key.startswith(training_keys.PREFIXES)
    return spelling.instead in (_TRAINER, *map(_MIXED.format, ("bfloat16", "float16")))


def of_sections(sections: Iterable[type[Any]]) -> Mapping[str, Spelling]:
    """Return the spellings of core keys and those that sections carry; ours of the core win."""
    found: dict[str, Spelling] = {}
    for section in sections:
        for theirs, spelling in getattr(section, "spellings", {}).items():
            found.setdefault(theirs, spelling)
    return {**found, **SPELLINGS}
