"""What other tools call the keys of the section ``lora``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from llmload.plugin import DTYPE_WORDS, Keys, Removal, Sentence, Spelling, listed, switch, words

_ALL_LORA: Final = "PEFT, TRL, axolotl and LLaMA-Factory"


def _targets(value: object) -> object:
    named = value[0] if isinstance(value, list) and len(value) == 1 else value
    return "all-linear" if named in ("all", "all-linear") else listed(value)


def _is_lora(value: object) -> object:
    if value == "qlora":
        return Keys({"kbit": {"bits": 4}, "lora": {}})
    if value == "lora":
        return {}
    return Removal.DEFAULT if value == "full" else Removal.UNKNOWN


def _adapters(value: object) -> object:
    """Of several, all but the last are merged before that one is resumed."""
    paths = listed(value)
    if not isinstance(paths, list) or not paths:
        return Removal.DEFAULT if isinstance(paths, list) else value
    *before, last = paths
    return Keys({"lora": {"merge_first": before, "adapter": last}}) if before else last


def _loftq(value: object) -> object:
    """axolotl's mapping of what PEFT takes beside its plain keys."""
    bits = value.get("loftq_config") if isinstance(value, Mapping) else None
    if not isinstance(bits, Mapping) or len(value) != 1:  # type: ignore[arg-type]
        return Sentence("Write its settings into `lora`.")
    return Keys({"lora": {"init_lora_weights": "loftq", "loftq_config": dict(bits)}})


def _iterations(value: object) -> object:
    number = value if type(value) is int and value > 0 else 0
    name = f"pissa_niter_{number}" if number else "pissa"
    return Sentence(f"Write `lora: {{init_lora_weights: {name}}}`.")


def _autocast(value: object) -> object:
    return Removal.DEFAULT if value else Sentence("Write the dtype into `lora.adapter_dtype`.")


def _initial(value: object) -> object:
    return {"true": True, "false": False}.get(str(value).lower(), value)


SPELLINGS: Final[Mapping[str, Spelling]] = {
    "use_peft": Spelling("TRL", "lora", switch({})),
    "peft_config": Spelling("TRL", "lora"),
    "lora_config": Spelling("ColossalChat", "lora"),
    "adapter": Spelling("axolotl", "lora", _is_lora),
    "finetuning_type": Spelling("LLaMA-Factory", "lora", _is_lora),
    "tuner_type": Spelling("ms-swift", "lora", _is_lora),
    "train_type": Spelling("ms-swift", "lora", _is_lora),
    "adapter_name_or_path": Spelling("LLaMA-Factory", "lora.adapter", _adapters),
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
    "lora_target_linear": Spelling("axolotl", "lora.target_modules", switch("all-linear")),
    "lora_module_name": Spelling(
        "DeepSpeed-Chat", "lora.target_modules", lambda part: "all-linear"
    ),
    "target_modules": Spelling("PEFT and ms-swift", "lora.target_modules", _targets),
    "lora_target_parameters": Spelling("TRL and axolotl", "lora.target_parameters"),
    "additional_target": Spelling("LLaMA-Factory", "lora.modules_to_save", listed),
    "lora_modules_to_save": Spelling("TRL and axolotl", "lora.modules_to_save"),
    "modules_to_save": Spelling("PEFT and ms-swift", "lora.modules_to_save"),
    "lora_train_bias": Spelling("ColossalChat", "lora.bias"),
    "lora_dtype": Spelling("ms-swift", "lora.adapter_dtype", words(DTYPE_WORDS)),
    "peft_ensure_weight_tying": Spelling("axolotl", "lora.ensure_weight_tying"),
    "lora_fan_in_fan_out": Spelling("axolotl", "lora.fan_in_fan_out"),
    "use_rslora": Spelling("TRL and LLaMA-Factory", "lora.use_rslora"),
    "peft_use_rslora": Spelling("axolotl", "lora.use_rslora"),
    "use_dora": Spelling("TRL and LLaMA-Factory", "lora.use_dora"),
    "peft_use_dora": Spelling("axolotl", "lora.use_dora"),
    "pissa_init": Spelling("LLaMA-Factory", "lora.init_lora_weights", switch("pissa_niter_16")),
    "pissa_iter": Spelling("LLaMA-Factory", "lora.init_lora_weights", _iterations),
    "init_lora_weights": Spelling("PEFT", "lora.init_lora_weights"),
    "init_weights": Spelling("ms-swift", "lora.init_lora_weights", _initial),
    "peft_init_lora_weights": Spelling("axolotl", "lora.init_lora_weights"),
    "lora_rank_pattern": Spelling("axolotl", "lora.rank_pattern"),
    "lora_alpha_pattern": Spelling("axolotl", "lora.alpha_pattern"),
    "peft": Spelling("axolotl", "lora", _loftq),
    "peft_autocast_adapter_dtype": Spelling("axolotl", "lora.adapter_dtype", _autocast),
    "create_new_adapter": Spelling(
        "LLaMA-Factory",
        instead="Remove it: adapters before it go into `lora.merge_first`, without `lora.adapter`.",
    ),
    "adapter_folder": Spelling(
        "LLaMA-Factory", instead="Remove it: the whole path goes into `lora.adapter`."
    ),
    "peft_layers_to_transform": Spelling("axolotl", "lora.layers_to_transform"),
    "peft_layers_pattern": Spelling("axolotl", "lora.layers_pattern"),
    "peft_layer_replication": Spelling("axolotl", "lora.layer_replication"),
    "peft_trainable_token_indices": Spelling("axolotl", "lora.trainable_token_indices"),
}
