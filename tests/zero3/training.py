"""Run on every rank: trainers of transformers and TRL, started with a DeepSpeed config.

Each trains a model of ours, and one that it has made by itself, with the same seeds.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from zero3.grouping import digests

import llmload
from llmload.model.partitions import is_partitioned
from llmload.testing import SENTENCES

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

SEED = 42
"""The trainers seed themselves with this before they draw an adapter."""
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
ROWS = [{"input_ids": list(range(4 + row, 16 + row))} for row in range(8)]
PAIRS = [
    {"prompt": text, "chosen": f" {other}", "rejected": " the fox"}
    for text, other in zip(SENTENCES, SENTENCES[::-1], strict=True)
]
CONFIG: dict[str, Any] = {
    "zero_optimization": {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
    "bf16": {"enabled": "auto"},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
OF_TRL: dict[str, Any] = {
    "gradient_checkpointing": False,
    "model_init_kwargs": {"dtype": "bfloat16"},
}


ANNOUNCED = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
"""Whether ``accelerate launch`` has the DeepSpeed config, and tells the trainers of it. Seen before
the first trainer, which says so itself from then on."""


def options(place: str) -> dict[str, Any]:
    """Return what every trainer is told; the DeepSpeed config is a file, as usual."""
    file = Path(place, f"deepspeed-{os.environ['RANK']}.json")
    file.write_text(json.dumps(CONFIG))
    return {
        "output_dir": place,
        "deepspeed": None if ANNOUNCED else str(file),
        "use_cpu": True,
        "bf16": True,
        "max_steps": 3,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": SEED,
    }


def spec(folder: str, *, adapter: bool) -> dict[str, Any]:
    zero3 = {} if ANNOUNCED else {"config": CONFIG}
    asked: dict[str, Any] = {"model": folder, "dtype": "bfloat16", "zero3": zero3}
    return asked | ({"lora": LORA | {"adapter_dtype": "base"}} if adapter else {})


def ours(folder: str, *, adapter: bool) -> dict[str, Any]:
    torch.manual_seed(SEED)
    return {"model": llmload.load(spec(folder, adapter=adapter)).model}


def ours_for_dpo(folder: str, *, adapter: bool) -> dict[str, Any]:
    """A policy and its reference: the policy with its adapter off, which TRL does by itself, or a
    second partitioned model."""
    torch.manual_seed(SEED)
    reference = {"adapter_of": "policy"} if adapter else {"like": "policy", "trainable": False}
    policy = spec(folder, adapter=adapter)
    group = llmload.load_group({"models": {"policy": policy, "reference": reference}})
    handed = {"model": group["policy"].model}
    return handed if adapter else handed | {"ref_model": group["reference"].model}


def theirs(folder: str, *, adapter: bool) -> dict[str, Any]:
    """As a script does for the Trainer, which makes no models."""
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto")
    torch.manual_seed(SEED)
    if adapter:
        config = peft.LoraConfig(task_type="CAUSAL_LM", **LORA)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    return {"model": model}


def made_by_trl(folder: str, *, adapter: bool) -> dict[str, Any]:
    """What TRL makes by itself from a name."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **LORA)
    return {"model": folder} | ({"peft_config": config} if adapter else {})


def trainer(arguments: Any, handed: dict[str, Any], folder: str) -> Any:
    data = [row | {"labels": row["input_ids"]} for row in ROWS]
    return Trainer(args=arguments, train_dataset=data, **handed)


def sft(arguments: Any, handed: dict[str, Any], folder: str) -> Any:
    from datasets import Dataset
    from trl import SFTTrainer

    handed |= {"processing_class": AutoTokenizer.from_pretrained(folder)}
    return SFTTrainer(args=arguments, train_dataset=Dataset.from_list(ROWS), **handed)


def dpo(arguments: Any, handed: dict[str, Any], folder: str) -> Any:
    from datasets import Dataset
    from trl import DPOTrainer

    handed |= {"processing_class": AutoTokenizer.from_pretrained(folder)}
    return DPOTrainer(args=arguments, train_dataset=Dataset.from_list(PAIRS), **handed)


def arguments_of(kind: str, place: str) -> Any:
    if kind == "trainer":
        return TrainingArguments(**options(place))
    from trl import DPOConfig, SFTConfig

    if kind == "dpo":
        return DPOConfig(**options(place), **OF_TRL)
    prepared = {"skip_prepare_dataset": True}
    return SFTConfig(**options(place), **OF_TRL, dataset_kwargs=prepared)


def train(folder: str, place: str, way: str, kind: str, *, adapter: bool) -> dict[str, Any]:
    """Train three steps, and save.

    :param way: ``theirs``, or when we load: ``before`` the arguments are made or ``after``.
    :param kind: of trainer.
    """
    load = ours_for_dpo if kind == "dpo" else ours
    handed = load(folder, adapter=adapter) if way == "before" else {}
    arguments = arguments_of(kind, place)
    deepspeed.init_distributed("gloo")  # as accelerate does where there is a GPU
    if way == "theirs":
        load = theirs if kind == "trainer" else made_by_trl
    handed = handed or load(folder, adapter=adapter)
    chosen = {"trainer": trainer, "sft": sft, "dpo": dpo}[kind](arguments, handed, folder)
    chosen.train()
    chosen.save_model(place)
    history = [entry["loss"] for entry in chosen.state.log_history if "loss" in entry]
    partitioned = all(map(is_partitioned, chosen.model.parameters()))
    return {"losses": history, "digests": digests(chosen.model), "partitioned": partitioned}


def every(folder: str, place: str, way: str, kinds: list[str]) -> dict[str, dict[str, Any]]:
    """Train with each kind of trainer, an adapter and all parameters, one after the other."""
    found = {}
    for kind in kinds:
        for what in ("full", "adapter"):
            own = Path(place, f"{kind}-{what}")
            own.mkdir(exist_ok=True)
            adapter = what == "adapter"
            found[f"{kind} {what}"] = train(folder, str(own), way, kind, adapter=adapter)
    return found
