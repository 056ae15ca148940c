"""QLoRA: a base model quantised to 4 bits, prepared, and wrapped in an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .case import Case

TITLE = "k-bit and QLoRA"

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


def their_config() -> Any:
    """Return transformers' words for what ``KBIT`` asks for."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def theirs(folder: Path, prepare: str | None) -> Any:
    """Load with transformers, and with ``prepare`` go on with PEFT, as its documentation shows."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=their_config(), dtype=torch.bfloat16
    )
    if prepare is None:
        return model
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))


def kept(folder: Path) -> Any:
    """Load a base that an earlier process has quantised and kept."""
    import llmload

    return llmload.load(cached(folder))


def cached(folder: Path) -> dict[str, Any]:
    """Make the spec of a load with a cache beside the folder."""
    place = folder.parent / f"{folder.name}-kept"
    return spec(folder, None) | {"kbit": KBIT | {"cache": {"folder": str(place)}}}


def filled(folder: Path) -> Iterator[Any]:
    """Quantise and keep, as a first load does: the cache is empty before."""
    import shutil

    import llmload

    shutil.rmtree(folder.parent / f"{folder.name}-first", ignore_errors=True)
    place = folder.parent / f"{folder.name}-first"
    section = KBIT | {"cache": {"folder": str(place)}}
    result = llmload.load(spec(folder, None) | {"kbit": section})
    yield "load"
    assert result.report.facts["kbit"]["cache"]["outcome"] == "kept"


def not_kept(folder: Path) -> Any:
    """Load without a cache: quantise."""
    return ours(folder, None)


def _case(title: str, prepare: str | None, peer: str, target: str) -> Case:
    return Case(
        title=title,
        sides={"llmload": partial(ours, prepare=prepare), peer: partial(theirs, prepare=prepare)},
        target=target,
        final=partial(final_mib, prepare=prepare),
        imports=IMPORTS,
    )


CASES = {
    "kept": Case(
        title="nf4 with double quantisation, the second time",
        sides={
            "llmload": kept,
            "llmload, the first time": filled,
            "llmload, no cache": not_kept,
        },
        target="at least 5x faster than the first time",
        final=partial(final_mib, prepare=None),
        imports=IMPORTS,
    ),
    "kbit": _case(
        "nf4 with double quantisation",
        None,
        "from_pretrained",
        "at least 8x faster, stretch 15x",
    ),
    "qlora": _case(
        "nf4, legacy preparation, LoRA",
        "legacy",
        "from_pretrained, prepare_model_for_kbit_training, get_peft_model",
        "peak at most 1.05x the final size",
    ),
}
