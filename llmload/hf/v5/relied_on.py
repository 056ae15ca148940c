"""The private functions of transformers 5 that are called here, as they are in 5.23."""

from __future__ import annotations

from llmload.hf.private_functions import first_difference

_SIGNATURES = {
    "core_model_loading:convert_and_load_state_dict_in_model": (
        "model state_dict load_config disk_offload_index"
    ),
    "core_model_loading:build_glob_alternation": "globs",
    "core_model_loading:dot_natural_key": "s",
    "core_model_loading:rename_source_key": (
        "source_key weight_renamings weight_converters base_model_prefix meta_state_dict reverse"
    ),
    "core_model_loading:spawn_materialize": (
        "thread_pool tensor device dtype sharding_op tensor_idx"
    ),
    "core_model_loading:set_param_for_module": (
        "model target_name param_value loading_info hf_quantizer"
    ),
    "conversion_mapping:_build_checkpoint_conversion_mapping": "",
    "conversion_mapping:get_checkpoint_conversion_mapping": "model_type",
    "conversion_mapping:get_model_conversion_mapping": "model key_mapping hf_quantizer add_legacy",
    "monkey_patching:patch_output_recorders": "model",
    "modeling_utils:_get_dtype": (
        "dtype checkpoint_files config sharded_metadata state_dict weights_only hf_quantizer"
    ),
    "modeling_utils:caching_allocator_warmup": "model expanded_device_map hf_quantizer",
    "modeling_utils:PreTrainedModel.get_init_context": (
        "dtype is_quantized _is_ds_init_called allow_all_kernels"
    ),
    "modeling_utils:PreTrainedModel._get_dtype_plan": "self dtype",
    "modeling_utils:PreTrainedModel._finalize_model_loading": "model load_config loading_info",
    "modeling_utils:PreTrainedModel._adjust_missing_and_unexpected_keys": "self loading_info",
    "modeling_utils:PreTrainedModel.set_use_kernels": "self use_kernels kernel_config mode",
    "generation:GenerationMixin.adjust_generation_fn": (
        "self generation_config from_auto_class from_pipeline pretrained_model_name_or_path "
        "cache_dir force_download proxies local_files_only token revision subfolder "
        "trust_remote_code kwargs"
    ),
    "integrations.accelerate:check_and_set_device_map": "device_map",
    "integrations.accelerate:_get_device_map": "model device_map max_memory hf_quantizer",
    "integrations.accelerate:expand_device_map": "device_map param_names",
    "integrations.accelerate:accelerate_dispatch": (
        "model hf_quantizer device_map offload_folder offload_index offload_buffers"
    ),
    "utils.logging:set_tqdm_hook": "hook",
    "utils.loading_report:LoadStateDictInfo": (
        "missing_keys unexpected_keys mismatched_keys error_msgs conversion_errors skipped_pp_keys"
    ),
}


def unsuited() -> str | None:
    """The first private function of the installed transformers that is not as expected, or None."""
    return first_difference(_SIGNATURES, "5.23")
