"""QLoRA: a base model quantised to 4 bits, prepared, and wrapped in an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

KBIT: dict[str, Any] = {"quant_type": "nf4", "double_quant": True}
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
IMPORTS = ("accelerate", "bitsandbytes", "peft")


def spec(folder: Path, prepare: str | None) -> dict[str, Any]:
    """Make the spec of a load; with ``prepare``, with that preparation and an adapter."""
    plain = {"model": str(folder), "dtype": "bfloat16", "kbit": KBIT}
    return plain if prepare is None else plain | {"kbit": KBIT | {"prepare": prepare}, "lora": LORA}


def final_mib(folder: Path, prepare: str | None) -> float:
    """Return what the finished model takes: parameters and the statistics of their codes."""
    import llmload

    plan = llmload.plan(spec(folder, prepare))
    return float(plan.parameter_bytes + plan.facts["kbit"]["statistics_bytes"]) / 2**20


def ours(folder: Path, prepare: str | None) -> Any:
    """Load through llmload: plan, load, audit and report."""
    import llmload

    return llmload.load(spec(folder, prepare))


def theirs(folder: Path, prepare: str | None) -> Any:
    """Load with transformers, and with ``prepare`` go on with PEFT, as its documentation shows."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16
    )
    if prepare is None:
        return model
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
