"""Thirty-six configs of three tools: the keys and values that their published examples have.

Facts, not copied files: what each sets, shortened where a tool repeats itself.
"""

from __future__ import annotations

from typing import Any, Final

_AX: Final[dict[str, Any]] = {
    "datasets": [{"path": "mhenrichsen/alpaca_2k_test", "type": "alpaca"}],
    "dataset_prepared_path": "last_run_prepared", "val_set_size": 0.05, "output_dir": "./out",
    "sequence_len": 4096, "sample_packing": True, "wandb_project": None, "wandb_entity": None,
    "gradient_accumulation_steps": 4, "micro_batch_size": 2, "num_epochs": 4,
    "optimizer": "adamw_bnb_8bit", "lr_scheduler": "cosine", "learning_rate": 0.0002,
    "bf16": "auto", "tf32": False, "gradient_checkpointing": True, "logging_steps": 1,
    "flash_attention": True, "warmup_steps": 10, "evals_per_epoch": 4, "saves_per_epoch": 1,
    "weight_decay": 0.0,
}  # fmt: skip
_AX_LORA: Final[dict[str, Any]] = {
    "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "lora_target_linear": True,
    "lora_model_dir": None, "lora_fan_in_fan_out": None,
}  # fmt: skip
_LF: Final[dict[str, Any]] = {
    "stage": "sft", "do_train": True, "dataset": "identity,alpaca_en_demo", "template": "llama3",
    "cutoff_len": 2048, "max_samples": 1000, "overwrite_cache": True, "logging_steps": 10,
    "preprocessing_num_workers": 16, "dataloader_num_workers": 4, "output_dir": "saves/llama3",
    "save_steps": 500, "plot_loss": True, "overwrite_output_dir": True, "save_only_model": False,
    "report_to": "none", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8,
    "learning_rate": 1e-4, "num_train_epochs": 3.0, "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1, "bf16": True, "ddp_timeout": 180000000, "resume_from_checkpoint": None,
}  # fmt: skip
_TRL: Final[dict[str, Any]] = {
    "dataset_name": "trl-lib/Capybara", "learning_rate": 2e-5, "num_train_epochs": 1,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "packing": True,
    "gradient_checkpointing": True, "eos_token": None, "logging_steps": 25, "output_dir": "out",
    "eval_strategy": "steps", "eval_steps": 100, "push_to_hub": True, "report_to": ["wandb"],
    "seed": 42, "bf16": True, "max_length": 2048, "save_strategy": "no",
}  # fmt: skip
_TRL_LORA: Final[dict[str, Any]] = {"use_peft": True, "lora_r": 32, "lora_alpha": 16}
LLAMA_3 = "NousResearch/Meta-Llama-3-8B"
LINEAR = ["gate_proj", "down_proj", "up_proj", "q_proj", "v_proj", "k_proj", "o_proj"]

CONFIGS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "axolotl": {
        "llama-3 qlora": _AX | _AX_LORA | {
            "base_model": LLAMA_3, "model_type": "AutoModelForCausalLM", "strict": False,
            "tokenizer_type": "AutoTokenizer", "load_in_8bit": False, "load_in_4bit": True,
            "adapter": "qlora", "special_tokens": {"pad_token": "<|end_of_text|>"},
        },
        "llama-3 lora": _AX | _AX_LORA | {
            "base_model": LLAMA_3, "load_in_8bit": True, "load_in_4bit": False, "adapter": "lora",
            "lora_modules_to_save": ["embed_tokens", "lm_head"], "s2_attention": None,
        },
        "llama-3 full": _AX | {
            "base_model": LLAMA_3, "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_rope": True,
            "xformers_attention": None, "train_on_inputs": False, "group_by_length": False,
        },
        "mistral qlora": _AX | _AX_LORA | {
            "base_model": "mistralai/Mistral-7B-v0.1", "is_mistral_derived_model": True,
            "load_in_4bit": True, "adapter": "qlora", "lora_target_linear": None,
            "lora_target_modules": LINEAR, "loss_watchdog_threshold": 5.0,
        },
        "tiny-llama lora": _AX | _AX_LORA | {
            "base_model": "TinyLlama/TinyLlama-1.1B", "model_type": "LlamaForCausalLM",
            "tokenizer_type": "LlamaTokenizer", "load_in_8bit": True, "adapter": "lora",
        },
        "pythia lora": _AX | {
            "base_model": "EleutherAI/pythia-1.4b-deduped", "load_in_8bit": True, "adapter": "lora",
            "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "flash_attention": None,
            "lora_target_modules": ["query_key_value"], "lora_fan_in_fan_out": True,
            "lora_target_linear": None,
        },
        "qwen dpo": _AX | {
            "base_model": "Qwen/Qwen2.5-0.5B", "rl": "dpo", "chat_template": "qwen_25",
            "strict": False, "resize_token_embeddings_to_32x": True,
        },
        "code-llama": _AX | _AX_LORA | {
            "base_model": "codellama/CodeLlama-7b-hf", "model_type": "LlamaForCausalLM",
            "adapter": "lora", "is_llama_derived_model": True,
            "special_tokens": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        },
        "deepspeed": _AX | {
            "base_model": "microsoft/Phi-3-mini-4k-instruct", "trust_remote_code": True,
            "deepspeed": "deepspeed_configs/zero3_bf16.json", "tokens": ["<|im_start|>"],
            "bf16": False, "fp16": True,
        },
        "from scratch": _AX | {
            "base_model": "HuggingFaceTB/SmolLM2-135M", "reinit_weights": True,
            "eager_attention": True, "flash_attention": None, "bf16": False,
            "overrides_of_model_config": {"attention_dropout": 0.1}, "device_map": "cpu",
            "unfrozen_parameters": ["lm_head.*"],
        },
        "offloaded checkpoints": _AX | _AX_LORA | {
            "base_model": "Qwen/Qwen3-32B", "load_in_4bit": True, "adapter": "qlora",
            "gradient_checkpointing": "offload", "lora_target_linear": None,
            "gradient_checkpointing_kwargs": {"use_reentrant": False}, "strict": False,
            "lora_target_modules": LINEAR, "attn_implementation": "xformers",
            "flash_attention": None, "eot_tokens": ["<|im_end|>"], "streaming": True,
        },
        "loftq": _AX | _AX_LORA | {
            "base_model": "NousResearch/Llama-2-7b-hf", "adapter": "lora",
            "peft": {"loftq_config": {"loftq_bits": 4}}, "liger_rms_norm": False,
        },
        "experts in 4 bits": _AX | _AX_LORA | {
            "base_model": "google/gemma-4-26B-A4B", "load_in_4bit": True, "adapter": "qlora",
            "bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}, "use_kernels": True,
            "quantize_moe_experts": True, "model_config": {"attention_dropout": 0.1},
            "lora_rank_pattern": {"q_proj": 16}, "use_scattermoe": True, "reward_model": False,
        },
    },
    "llama-factory": {
        "lora sft": _LF | {
            "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct", "trust_remote_code": True,
            "finetuning_type": "lora", "lora_rank": 16, "lora_target": "all",
        },
        "lora dpo": _LF | {
            "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct", "stage": "dpo",
            "finetuning_type": "lora", "pref_beta": 0.1, "pref_loss": "sigmoid",
            "ref_model": "meta-llama/Meta-Llama-3-8B-Instruct",
        },
        "lora reward": _LF | {
            "model_name_or_path": LLAMA_3, "stage": "rm", "lora_target": "q_proj,v_proj",
            "finetuning_type": "lora", "bf16": False, "fp16": True,
        },
        "qlora": _LF | {
            "model_name_or_path": LLAMA_3, "quantization_bit": 4, "double_quantization": False,
            "quantization_method": "bnb", "finetuning_type": "lora", "lora_target": "all",
        },
        "8 bits": _LF | {
            "model_name_or_path": LLAMA_3, "quantization_bit": 8, "upcast_layernorm": True,
            "flash_attn": "fa2",
        },
        "full": _LF | {
            "model_name_or_path": LLAMA_3, "finetuning_type": "full",
            "deepspeed": "examples/deepspeed/ds_z3_config.json", "flash_attn": "sdpa",
        },
        "pure bf16": _LF | {
            "model_name_or_path": LLAMA_3, "finetuning_type": "full", "pure_bf16": True,
            "use_badam": True, "badam_mode": "layer",
        },
        "freeze": _LF | {
            "model_name_or_path": LLAMA_3, "finetuning_type": "freeze",
            "freeze_trainable_layers": 8, "freeze_trainable_modules": "all",
        },
        "merge": {
            "model_name_or_path": LLAMA_3, "adapter_name_or_path": "saves/llama3-8b/lora/sft",
            "template": "llama3", "finetuning_type": "lora", "trust_remote_code": True,
            "export_dir": "output/llama3_lora_sft", "export_size": 5, "export_device": "cpu",
            "export_legacy_format": False,
        },
        "pissa": _LF | {
            "model_name_or_path": LLAMA_3, "pissa_init": True, "resize_vocab": True,
            "new_special_tokens": "<tool>,<think>", "additional_target": "embed_tokens,lm_head",
            "use_rslora": True, "loraplus_lr_ratio": 16.0, "enable_liger_kernel": True,
            "lora_target": "q_proj,v_proj",
        },
        "pissa in few iterations": _LF | {
            "model_name_or_path": LLAMA_3, "finetuning_type": "lora", "pissa_init": True,
            "pissa_iter": 4, "pissa_convert": True, "use_v1_kernels": True, "lora_target": "q_proj",
        },
        "kernels for the CPU": _LF | {
            "model_name_or_path": LLAMA_3, "finetuning_type": "lora", "use_kt": True,
            "kt_config": {"kt_backend": "auto"}, "flash_attn": "auto", "streaming": False,
            "moe_aux_loss_coef": 0.001, "quantization_bit": 4, "quantization_type": "fp4",
        },
    },
    "trl": {
        "sft": _TRL | {"model_name_or_path": "Qwen/Qwen2-0.5B"},
        "sft lora": _TRL | _TRL_LORA | {"model_name_or_path": "Qwen/Qwen2-0.5B"},
        "zephyr sft qlora": _TRL | _TRL_LORA | {
            "model_name_or_path": "mistralai/Mistral-7B-v0.1", "model_revision": "main",
            "torch_dtype": "bfloat16", "attn_implementation": "flash_attention_2",
            "load_in_4bit": True, "lora_dropout": 0.05, "lora_target_modules": LINEAR,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "dataset_mixer": {"HuggingFaceH4/ultrachat_200k": 1.0},
        },
        "zephyr sft full": _TRL | {
            "model_name_or_path": "mistralai/Mistral-7B-v0.1", "torch_dtype": "bfloat16",
            "attn_implementation": "flash_attention_2", "use_peft": False, "lora_r": 16,
        },
        "dpo": _TRL | {
            "model_name_or_path": "Qwen/Qwen2-0.5B-Instruct", "beta": 0.1, "loss_type": "sigmoid",
            "dataset_name": "trl-lib/ultrafeedback_binarized", "dtype": "bfloat16",
            "disable_dropout": True,
        },
        "dpo lora": _TRL | _TRL_LORA | {
            "model_name_or_path": "Qwen/Qwen2-0.5B-Instruct", "lora_target_modules": ["all-linear"],
            "precompute_ref_log_probs": True, "use_rslora": True,
        },
        "reward": _TRL | _TRL_LORA | {
            "model_name_or_path": "Qwen/Qwen2-0.5B-Instruct", "lora_task_type": "SEQ_CLS",
            "center_rewards_coefficient": 0.01, "num_labels": 1,
            "task_type": "SEQ_CLS",
        },
        "grpo": _TRL | {
            "model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct", "model_revision": "main",
            "torch_dtype": "bfloat16", "use_vllm": True, "num_generations": 16,
            "max_prompt_length": 512, "max_completion_length": 1024, "temperature": 0.7,
            "vllm_mode": "colocate", "use_liger_kernel": True,
        },
        "kto 8 bits": _TRL | _TRL_LORA | {
            "model_name_or_path": "trl-lib/qwen1.5-1.8b-sft", "load_in_8bit": True,
            "lora_modules_to_save": ["lm_head"], "trust_remote_code": True,
        },
        "chat template": _TRL | {
            "model_name_or_path": "Qwen/Qwen3-0.6B-Base", "chat_template_path": "HuggingFaceTB/x",
            "eos_token": "<|im_end|>", "pad_token": "</s>",
            "model_init_kwargs": {"use_cache": False},
            "dtype": "float16",
        },
        "sft on a CPU": _TRL | _TRL_LORA | {
            "model_name_or_path": "Qwen/Qwen2-0.5B", "use_cpu": True, "full_determinism": True,
            "label_smoothing_factor": 0.1, "lora_target_parameters": None, "streaming": True,
            "bnb_4bit_quant_type": "fp4", "load_in_4bit": True, "use_bnb_nested_quant": True,
        },
    },
}  # fmt: skip
"""Tool -> name of the example -> its keys."""
