"""The private functions of transformers 4.51.3 that are called here, as they are there."""

from __future__ import annotations

from llmload.hf.private_functions import first_difference

_SIGNATURES = {
    "modeling_utils:_find_missing_and_unexpected_keys": (
        "cls model original_checkpoint_keys checkpoint_keys "
        "loading_base_model_from_task_state_dict hf_quantizer device_map"
    ),
    "modeling_utils:_infer_parameter_dtype": (
        "model param_name empty_param keep_in_fp32_regex hf_quantizer"
    ),
    "modeling_utils:_get_device_map": (
        "model device_map max_memory hf_quantizer torch_dtype keep_in_fp32_regex"
    ),
    "modeling_utils:no_init_weights": "",
    "modeling_utils:PreTrainedModel._autoset_attn_implementation": (
        "config use_flash_attention_2 torch_dtype device_map check_device_map"
    ),
    "modeling_utils:PreTrainedModel._get_key_renaming_mapping": (
        "self checkpoint_keys key_mapping loading_base_model_from_task_state_dict "
        "loading_task_model_from_base_state_dict"
    ),
    "modeling_utils:PreTrainedModel._move_missing_keys_from_meta_to_cpu": (
        "self missing_keys unexpected_keys dtype hf_quantizer"
    ),
    "modeling_utils:PreTrainedModel._initialize_missing_keys": (
        "self loaded_keys ignore_mismatched_sizes is_quantized"
    ),
}


def unsuited() -> str | None:
    """The first private function of the installed transformers that is not as expected, or None."""
    return first_difference(_SIGNATURES, "4.51")
