"""Run on every rank: groups in which one member is partitioned and another is not."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import GatheredParameters
from transformers.integrations import is_deepspeed_zero3_enabled
from zero3.comparing import deepspeed_config, losses
from zero3.faults import fault

import llmload
from llmload.builtin.zero3.process_group import connect
from llmload.model.partitions import is_partitioned

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

LORA = {"r": 4, "target_modules": "all-linear", "adapter_dtype": "base"}
IDS = torch.arange(24).view(2, 12)


def digests(model: torch.nn.Module) -> dict[str, str]:
    """Return the SHA-256 of each parameter, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        with GatheredParameters([parameter] if is_partitioned(parameter) else []):
            content = parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
            found[name] = hashlib.sha256(content).hexdigest()
    return found


def train_policy(folder: str, dtype: str, partitioned: str, *, lora: bool) -> dict[str, Any]:
    """Load policy and reference, train the policy three steps, and look at both.

    :param partitioned: the member that ZeRO-3 partitions.
    """
    zero3 = {"config": deepspeed_config(dtype)}
    policy: dict[str, Any] = {"model": folder, "dtype": dtype, "dropout": {"p": 0.0}}
    reference: dict[str, Any] = {"like": "policy", "trainable": False, "lora": None, "zero3": None}
    if lora:
        policy["lora"] = LORA
    {"policy": policy, "reference": reference}[partitioned]["zero3"] = zero3
    loaded = llmload.load_group({"models": {"policy": policy, "reference": reference}})
    outside = is_deepspeed_zero3_enabled()
    models = {name: result.model for name, result in loaded.items()}
    before = digests(models["reference"])
    if partitioned == "policy":
        fell = losses(models["policy"], "causal_lm", deepspeed_config(dtype))
        models["reference"](IDS)
    else:
        fell = plain_losses(models["policy"])
    return {
        "partitioned": [
            name for name, model in models.items() if any(map(is_partitioned, model.parameters()))
        ],
        "losses": fell,
        "zero3 is still on": outside,
        "unchanged": before == digests(models["reference"]),
        "as the whole": before == digests(llmload.load({"model": folder, "dtype": dtype}).model),
        "frozen": not any(p.requires_grad for p in models["reference"].parameters()),
    }


def view(folder: str, dtype: str) -> dict[str, Any]:
    """Train a partitioned policy, and ask its view with the adapter off between the steps."""
    config = deepspeed_config(dtype) | {"zero_allow_untested_optimizer": True}
    policy = {"model": folder, "dtype": dtype, "lora": LORA, "zero3": {"config": config}}
    spec = {"models": {"policy": policy, "reference": {"adapter_of": "policy"}}}
    loaded = llmload.load_group(spec)
    model, reference = loaded["policy"].model, loaded["reference"].model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    try:
        asked, fell = [reference(IDS).logits.clone()], []
        for _ in range(3):
            loss = engine(input_ids=IDS, labels=IDS).loss
            asked.append(reference(IDS).logits.clone())
            engine.backward(loss)
            engine.step()
            fell.append(loss.item())
        asked.append(reference(IDS).logits.clone())
    finally:
        engine.destroy()
    whole = llmload.load({"model": folder, "dtype": dtype}).model
    with torch.no_grad():
        expected = whole(IDS).logits
    return {"losses": fell, "as the whole": [torch.equal(logits, expected) for logits in asked]}


def plain_losses(model: Any) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = []
    for _ in range(3):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def second_fails(folder: str) -> dict[str, Any]:
    """Let the reference fail on every rank, after the policy was partitioned."""

    class Failing:
        name = "failing"

        class Section(llmload.Section):
            pass

        @llmload.hookimpl
        def init_context(self, ctx: Any) -> None:
            raise RuntimeError("no")

    policy = {"model": folder, "zero3": {"config": deepspeed_config("bfloat16")}}
    reference = {"like": "policy", "zero3": None, "failing": {}}
    linear, random = torch.nn.functional.linear, torch.get_rng_state()
    message = ""
    try:
        llmload.load_group(
            {"models": {"policy": policy, "reference": reference}},
            registry=llmload.create_registry([Failing]),
        )
    except llmload.LoadFailedError as error:
        message = str(error)
    return {
        "message": message,
        "as before": torch.nn.functional.linear is linear
        and torch.equal(torch.get_rng_state(), random)
        and not is_deepspeed_zero3_enabled(),
    }


def one_fails(
    folder: str, first: str, kind: str, culprit: int, deadline: float, seconds: float = 0.0
) -> dict[str, Any]:
    """Let the whole reference fail on one rank, before or after the policy is partitioned.

    :param seconds: that it takes to load on the others.
    """

    class Failing:
        name = "failing"

        class Section(llmload.Section):
            pass

        @llmload.hookimpl
        def post_load(self, ctx: Any, model: Any) -> Any:
            if not ctx.rehearsing and int(os.environ["RANK"]) == culprit:
                fault(kind)
            if not ctx.rehearsing:
                time.sleep(seconds)
            return model

    zero3 = {"config": deepspeed_config("bfloat16"), "deadline": deadline}
    policy = {"model": folder, "zero3": zero3}
    reference = {"model": folder, "trainable": False, "failing": {}}
    models = {"policy": policy, "reference": reference}
    if first == "reference":
        models = dict(reversed(models.items()))
    if kind == "exit":  # rank 0 too, which keeps the store that the ranks come together by
        connect()
        torch.distributed.barrier()
    start = time.monotonic()
    registry = llmload.create_registry([Failing])
    message = ""
    try:
        llmload.load_group({"models": models}, registry=registry)
    except llmload.LoadFailedError as error:
        message = str(error)
    return {"message": message, "seconds": time.monotonic() - start}


def two_partitioned(folder: str) -> dict[str, Any]:
    """Partition both members, which agree in turn, and train neither."""
    models = {"policy": {"model": folder, "zero3": {}}, "reference": {"like": "policy"}}
    models["reference"]["dtype"] = "float32"
    loaded = llmload.load_group({"models": models})
    same = llmload.load({"model": folder, "dtype": "float32"}).model
    return {
        "partitioned": [
            name for name, r in loaded.items() if all(map(is_partitioned, r.model.parameters()))
        ],
        "as the whole": digests(loaded["reference"].model) == digests(same),
    }
