"""transformers 5: the functions of ``llmload.hf.interface.Transformers``."""

from llmload.hf.v5.building import (
    adapters_left_alone,
    blank,
    built_under,
    computed,
    construct,
    give_own_kind,
    gives_memory,
    is_post_initialised,
    keeps_apart,
    no_init_weights,
    tied_names,
    ties,
    to_fill,
    trains_once_loaded,
    unloaded,
)
from llmload.hf.v5.checkpointing import (
    checkpoints_gradients,
    checkpoints_selectively,
    enable_checkpointing,
    require_input_gradients,
)
from llmload.hf.v5.configs import config_dtype, config_for, dtype_option, validate_to_save
from llmload.hf.v5.quantising import (
    leaves_unquantised,
    modules_left_unquantised,
    prepare_quantised,
    quantises_weight_by_weight,
)
from llmload.hf.v5.relied_on import unsuited
from llmload.hf.v5.streaming import (
    account,
    fill,
    final_dtypes,
    finish,
    kept_in_float32,
    resolve_device_map,
)

__all__ = [
    "account",
    "adapters_left_alone",
    "blank",
    "built_under",
    "checkpoints_gradients",
    "checkpoints_selectively",
    "computed",
    "config_dtype",
    "config_for",
    "construct",
    "dtype_option",
    "enable_checkpointing",
    "fill",
    "final_dtypes",
    "finish",
    "give_own_kind",
    "gives_memory",
    "is_post_initialised",
    "keeps_apart",
    "kept_in_float32",
    "leaves_unquantised",
    "modules_left_unquantised",
    "no_init_weights",
    "prepare_quantised",
    "quantises_weight_by_weight",
    "require_input_gradients",
    "resolve_device_map",
    "tied_names",
    "ties",
    "to_fill",
    "trains_once_loaded",
    "unloaded",
    "unsuited",
    "validate_to_save",
]
