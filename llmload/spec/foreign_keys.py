"""What other tools call our keys, so that their users are answered with ours.

Looked up only for keys and values that nothing here knows: a plugin may use any of these names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, get_args

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
        if self.instead:
            return self.instead
        if value is None:
            return Removal.DEFAULT.value
        if value is HIDDEN:
            return self._moved()
        found = self.convert(value)
        if isinstance(found, Removal):
            return str(found.value)
        if isinstance(found, Sentence):
            return found.text
        keys = found.keys if isinstance(found, Keys) else self._nested(found)
        written = [f"{key}: {dump_inline(part)}" for key, part in keys.items()]
        if sum(map(len, written)) > _SHOWN:
            return self._moved()
        return f"Write {' and '.join(f'`{text}`' for text in written)}."

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
