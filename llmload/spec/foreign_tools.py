"""The tools whose configs are converted: how a file of theirs is known, and what they do unasked.

What they call our keys stands in :mod:`llmload.spec.foreign_keys` and in the sections' spellings.
Sources: TRL's ``ModelConfig``, axolotl's ``utils/schemas``, LLaMA-Factory's ``hparams``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Tool:
    """One tool with configs of its own."""

    name: str
    """As ``--from`` takes it."""
    known_by: frozenset[str]
    """Keys that its files have and those of the others do not."""
    assumed: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    """A config -> what holds beside it, in the tool's own keys."""
    adapts: Callable[[Mapping[str, Any]], bool]
    """A config -> whether an adapter is trained."""
    switch: str
    """What turns the adapter on, for messages."""


def _trl(theirs: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "torch_dtype" not in theirs:
        found["dtype"] = "float32"
    if theirs.get("use_peft"):
        found |= {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
    return found


def _axolotl(theirs: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if theirs.get("bf16", "auto") in (True, "auto", "full") or theirs.get("bfloat16"):
        found["bfloat16"] = True
    elif theirs.get("fp16") or theirs.get("float16"):
        found["float16"] = True
    else:
        found["torch_dtype"] = "float32"
    if theirs.get("load_in_4bit"):
        found["bnb_4bit_use_double_quant"] = True
    return found


def _llama_factory(theirs: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"finetuning_type": "lora"}
    computes = next((dtype for dtype in ("bf16", "fp16") if theirs.get(dtype)), None)
    if computes is not None:  # what is trained in full is cast to float32 then
        adapter = _adapts_by_default(theirs) or bool(theirs.get("pure_bf16"))
        found["infer_dtype"] = computes if adapter else "float32"
    if _adapts_by_default(theirs):
        rank = theirs.get("lora_rank") or 8
        found |= {"lora_rank": 8, "lora_alpha": 2 * rank, "lora_target": "all"}
    if theirs.get("quantization_bit") == 4:
        found["double_quantization"] = True
    return found


def _adapts_by_default(theirs: Mapping[str, Any]) -> bool:
    return bool(theirs.get("finetuning_type", "lora") == "lora")


TOOLS: Final = (
    Tool(
        "axolotl",
        frozenset(
            ("base_model", "datasets", "micro_batch_size", "sequence_len", "val_set_size",
             "adapter", "num_epochs", "optimizer", "lr_scheduler", "special_tokens")
        ),
        _axolotl,
        lambda theirs: theirs.get("adapter") in ("lora", "qlora"),
        "adapter",
    ),
    Tool(
        "llama-factory",
        frozenset(
            ("adapter_name_or_path", "cutoff_len", "dataset", "dataset_dir", "do_train",
             "finetuning_type", "flash_attn", "infer_dtype", "lora_rank", "lora_target",
             "pref_loss", "quantization_bit", "stage", "template", "val_size")
        ),
        _llama_factory,
        _adapts_by_default,
        "finetuning_type",
    ),
    Tool(
        "trl",
        frozenset(
            ("attn_implementation", "dataset_name", "dataset_config", "dtype", "lora_r",
             "max_length", "lora_target_modules", "model_revision", "packing", "torch_dtype",
             "use_peft", "eval_strategy", "dataset_train_split", "dataset_test_split",
             "max_prompt_length")
        ),
        _trl,
        lambda theirs: bool(theirs.get("use_peft")),
        "use_peft",
    ),
)  # fmt: skip
