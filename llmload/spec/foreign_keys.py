"""What other tools call our keys, so that their users are answered with ours.

Looked up only for keys and values that nothing here knows: a plugin may use any of these names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from llmload.spec.yaml_write import dump_inline

_SHOWN: Final = 60
"""Characters of a value that a fix repeats."""


class Removal(Enum):
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
        if isinstance(value, Removal):
            return value.value
        text = dump_inline(value)
        *sections, key = self.ours.split(".")
        text = f"{key}: {text if len(text) <= _SHOWN else '...'}"
        for section in reversed(sections):
            text = f"{section}: {{{text}}}"
        return f"Write `{text}`."


def switch(on: object) -> Callable[[Any], Any]:
    """Their true is ``on`` here; their false or null needs no key."""
    return lambda value: on if value else Removal.DEFAULT


def words(names: Mapping[str, str]) -> Callable[[Any], Any]:
    """Their words for values are ours under other names; what is no such word stays."""
    return lambda value: names.get(value, value) if isinstance(value, str) else value


def listed(value: object) -> object:
    """Split a list that is written as text with commas."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


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
_ATTENTION: Final = {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "disabled": "eager"}

VALUES: Final[Mapping[str, str]] = {
    **{theirs.lower(): ours for theirs, ours in {**_CLASSES, **DTYPE_WORDS}.items()},
    "causal": "causal_lm",
    "seq2seq": "seq2seq_lm",
    "all": "all-linear",
}
"""Words of other tools in lower case -> ours, for keys that take one of a few words."""

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
    "model_type": Spelling("axolotl", "auto_class", words(_CLASSES)),
    "type_of_model": Spelling("axolotl", "auto_class", words(_CLASSES)),
    "task_type": Spelling(
        "PEFT and ms-swift", "auto_class", words({**_CLASSES, "CAUSAL_LM": "causal_lm"})
    ),
    "torch_dtype": Spelling("transformers, TRL and ms-swift", "dtype", words(DTYPE_WORDS)),
    "infer_dtype": Spelling("LLaMA-Factory", "dtype", words(DTYPE_WORDS)),
    "mixed_precision": Spelling("ColossalChat", "dtype", words(DTYPE_WORDS)),
    "policy_dtype": Spelling("the DPO reference code", "dtype", words(DTYPE_WORDS)),
    "reference_dtype": Spelling("the DPO reference code", "dtype", words(DTYPE_WORDS)),
    "bf16": Spelling("transformers' trainer and axolotl", instead=_MIXED.format("bfloat16")),
    "fp16": Spelling("transformers' trainer and axolotl", instead=_MIXED.format("float16")),
    "bfloat16": Spelling("axolotl", "dtype", switch("bfloat16")),
    "float16": Spelling("axolotl", "dtype", switch("float16")),
    "pure_bf16": Spelling("LLaMA-Factory", "dtype", switch("bfloat16")),
    "train_from_scratch": Spelling("LLaMA-Factory", "weights", switch("random")),
    "reinit_weights": Spelling("axolotl", "weights", switch("random")),
    "local_dirs": Spelling("the DPO reference code", "cache_dir"),
    "key_mapping": Spelling("transformers", "key_map"),
    "archive": Spelling("the DPO reference code", "weights_from"),
    "flash_attn": Spelling("LLaMA-Factory", "attn_implementation", words(_ATTENTION)),
    "attn_impl": Spelling("ms-swift", "attn_implementation"),
    "flash_attention": Spelling("axolotl", "attn_implementation", switch("flash_attention_2")),
    "use_flash_attention_2": Spelling(
        "transformers and TRL", "attn_implementation", switch("flash_attention_2")
    ),
    "use_flash_attn": Spelling("ColossalChat", "attn_implementation", switch("flash_attention_2")),
    "sdp_attention": Spelling("axolotl", "attn_implementation", switch("sdpa")),
    "flex_attention": Spelling("axolotl", "attn_implementation", switch("flex_attention")),
    "eager_attention": Spelling("axolotl", "attn_implementation", switch("eager")),
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

SPELLINGS: Final[Mapping[str, Spelling]] = {**_CORE, **_WITHOUT_COUNTERPART}
"""Their key, or dotted path, in a spec -> what to write here, of core keys and of no key at all.
What they call the keys of a section stands in its ``spellings``."""


def of_sections(sections: Iterable[type[Any]]) -> Mapping[str, Spelling]:
    """Return the spellings of core keys and those that sections carry; ours of the core win."""
    found: dict[str, Spelling] = {}
    for section in sections:
        for theirs, spelling in getattr(section, "spellings", {}).items():
            found.setdefault(theirs, spelling)
    return {**found, **SPELLINGS}
