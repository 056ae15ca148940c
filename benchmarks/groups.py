"""A policy and its frozen reference in one process: a group against two ``from_pretrained``.

Mapped pages take no memory before they are looked at, so all weights of both models are read before
it is measured, as a forward of each would. Then the policy's trainable weights are all written
once, as its first optimizer step does: what was shared only until then shows here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .case import Case, Mark

TITLE = "Policy and reference"

LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
PEER = "two from_pretrained"
REFERENCE: dict[str, Any] = {"like": "policy", "lora": None, "trainable": False}
OFF: dict[str, Any] = {"adapter_of": "policy"}


def spec(folder: Path, policy: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Make the group."""
    return {"models": {"policy": {"model": str(folder), **policy}, "reference": reference}}


def final_mib(folder: Path, policy: dict[str, Any], reference: dict[str, Any]) -> float:
    """Return what both members take together, once what they share has been counted once."""
    import llmload

    plan = llmload.plan_group(spec(folder, policy, reference))
    total = sum(member.parameter_bytes for member in plan.members.values())
    return (total - plan.saved_bytes) / 2**20


def ours(folder: Path, policy: dict[str, Any], reference: dict[str, Any]) -> Iterator[Mark]:
    """Load through llmload: plans, loads, audits and reports of both members."""
    import llmload

    group = llmload.load_group(spec(folder, policy, reference))
    yield "load"
    yield from _use(group["policy"].model, group["reference"].model)


def theirs(folder: Path, policy: dict[str, Any], reference: dict[str, Any]) -> Iterator[Mark]:
    """Load twice with transformers, and put PEFT's adapter around the first."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    def load(dtype: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))

    trained = load(policy["dtype"])
    if "lora" in policy:
        trained = peft.get_peft_model(trained, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
    frozen = load(reference.get("dtype", policy["dtype"])).eval().requires_grad_(False)
    yield "load"
    yield from _use(trained, frozen)


def _use(policy: Any, reference: Any) -> Iterator[Mark]:
    import torch

    with torch.no_grad():
        for model in (policy, reference):
            for parameter in model.parameters():
                parameter.sum()
        yield "read all weights", {"PSS MiB, read": _pss_mib()}
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.999)
    yield "write what is trained", {"PSS MiB, written": _pss_mib()}


def _pss_mib() -> float:
    """Return this process's proportional set size: pages that it maps twice count once."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def _case(title: str, policy: dict[str, Any], reference: dict[str, Any], target: str) -> Case:
    def bound(side: Callable[..., Any]) -> Any:
        return partial(side, policy=policy, reference=reference)

    return Case(
        title=title,
        sides={"llmload": bound(ours), PEER: bound(theirs)},
        target=target,
        final=bound(final_mib),
        imports=("peft",),
    )


CASES = {
    "same-dtype": _case(
        "bfloat16 policy, bfloat16 reference",
        {"dtype": "bfloat16"},
        {"like": "policy", "trainable": False},
        "never worse",
    ),
    "lora-float32": _case(
        "float32 LoRA policy, float32 reference",
        {"dtype": "float32", "lora": LORA},
        REFERENCE,
        "at least 1.8x less memory while the shared layers stay frozen",
    ),
    "float32-float16": _case(
        "float32 policy, float16 reference",
        {"dtype": "float32"},
        {"like": "policy", "dtype": "float16", "trainable": False},
        "nothing is shared: not slower, not more memory",
    ),
    "adapter-of": _case(
        "float32 LoRA policy, reference its adapter off",
        {"dtype": "float32", "lora": LORA},
        OFF,
        "the reference takes no memory",
    ),
}
