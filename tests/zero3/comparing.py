"""Run on every rank: our ZeRO-3 load held against transformers' own, bit by bit."""

from __future__ import annotations

import gc
import shutil
import time
import warnings
from typing import Any

import architectures
import deepspeed
import torch
from transformers.integrations import HfDeepSpeedConfig

import llmload
from llmload.builtin.zero3.leaves import mark_leaf_modules

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def deepspeed_config(
    dtype: str, threshold: int | None = None, offload: str | None = None
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3}
    if offload is not None:
        zero["offload_param"] = {"device": offload, "pin_memory": False}
    if threshold is not None:
        zero["stage3_param_persistence_threshold"] = threshold
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
    }


def theirs(
    kind: str, folder: str, config: dict[str, Any], key_map: dict[str, str] | None = None
) -> torch.nn.Module:
    alive = HfDeepSpeedConfig(config)
    try:
        return architectures.AUTO_CLASSES[kind].from_pretrained(folder, key_mapping=key_map)
    finally:
        del alive


def ours(
    kind: str,
    folder: str,
    config: dict[str, Any],
    dtype: str,
    key_map: dict[str, str] | None = None,
    loader: str = "streaming",
    reading: str | None = None,
) -> torch.nn.Module:
    block = {"streaming"} - {loader}
    result = llmload.load(
        {
            "model": folder,
            "auto_class": kind,
            "dtype": dtype,
            "key_map": key_map or {},
            "strict": False,
            "zero3": {"config": config},
            **({"streaming": {"reading": reading}} if reading else {}),
        },
        registry=llmload.create_registry(block=block),
    )
    assert result.report.loader == loader, result.report.declined
    return result.model


PADDING = "padding is not zero"
"""Ours is; DeepSpeed, which partitions for from_pretrained, leaves whatever the memory held."""


WHOLE = "only ours is partitioned"
"""Ours holds the values of theirs, which DeepSpeed partitions in ``initialize``."""

UNREAD = "other values than theirs, which rank 0 alone has read"
"""transformers reads on rank 0 what ``zero.Init`` overlooked. Until ``initialize`` nobody tells the
other ranks, where theirs hold what the memory held; rank 0 compares the whole of ours."""


def differences(mine: torch.nn.Module, other: torch.nn.Module) -> list[str]:
    """List in what the parts, attributes and buffers of two partitioned models differ."""
    found = []
    a, b = (dict(m.named_parameters(remove_duplicate=False)) for m in (mine, other))
    if list(a) != list(b):
        return [f"parameters {sorted(a.keys() ^ b.keys())[:4]}"]
    for name in a:
        found += [f"{name}: {fault}" for fault in _parameter(a[name], b[name])]
    if _ties(a) != _ties(b):
        found.append("ties")
    a, b = (dict(m.named_buffers(remove_duplicate=False)) for m in (mine, other))
    if list(a) != list(b):
        return [*found, f"buffers {sorted(a.keys() ^ b.keys())[:4]}"]
    for name in a:
        if a[name].dtype != b[name].dtype:
            found.append(f"{name}: buffer {a[name].dtype} for {b[name].dtype}")
        elif not torch.equal(_bytes(a[name]), _bytes(b[name])):
            found.append(f"{name}: other values in the buffer")
    if [m.training for m in mine.modules()] != [m.training for m in other.modules()]:
        found.append("train mode")
    return found


def _parameter(mine: Any, other: Any) -> list[str]:
    if hasattr(mine, "ds_tensor") and not hasattr(other, "ds_tensor"):
        with deepspeed.zero.GatheredParameters(mine):
            if torch.equal(mine, other):
                return [WHOLE]
        return [WHOLE, UNREAD if torch.distributed.get_rank() else "other values"]
    if not hasattr(mine, "ds_tensor"):
        return ["not partitioned"]
    facts = ("dtype", "ds_shape", "ds_numel", "ds_numel_aligned", "ds_persist", "requires_grad")
    facts += ("ds_status", "shape", "device")
    found = [
        f"{fact} {getattr(mine, fact)} for {getattr(other, fact)}"
        for fact in facts
        if getattr(mine, fact) != getattr(other, fact)
    ]
    a, b = mine.ds_tensor, other.ds_tensor
    for fact in ("dtype", "ds_numel", "status", "final_location", "requires_grad", "shape"):
        if getattr(a, fact) != getattr(b, fact):
            found.append(f"part's {fact} {getattr(a, fact)} for {getattr(b, fact)}")
    if found:
        return found
    ranks = mine.ds_process_group.size()
    start = torch.distributed.get_rank() * a.ds_numel
    length = max(0, min(a.ds_numel, mine.ds_numel - start))
    assert mine.ds_numel_aligned == ranks * a.ds_numel
    if not torch.equal(_bytes(a[:length]), _bytes(b[:length])):
        found.append("other values in the part")
    if a[length:].any():
        found.append(PADDING)
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _ties(tensors: dict[str, torch.Tensor]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return sorted(names for names in groups.values() if len(names) > 1)


def losses(
    model: torch.nn.Module, kind: str, config: dict[str, Any], steps: int = 3
) -> list[float]:
    """Train a few steps with DeepSpeed on a batch that differs between ranks."""
    torch.manual_seed(0)
    mark_leaf_modules(model, ())  # nobody else does; ranks that use different experts would hang
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config | {"zero_allow_untested_optimizer": True}
    )
    ids = torch.arange(4, 20).reshape(2, 8) + torch.distributed.get_rank()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= {"labels": ids} if kind != "base" else {}
    found = []
    try:
        for _ in range(steps):
            outputs = engine(**inputs)
            loss = outputs.loss if kind != "base" else outputs[0].float().square().mean()
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
    finally:
        engine.destroy()
    return found


def _losses_or_why_not(
    model: torch.nn.Module, kind: str, config: dict[str, Any]
) -> list[float] | str:
    try:
        return losses(model, kind, config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]


def compare(
    kind: str,
    folder: str,
    dtype: str,
    threshold: int | None,
    train: bool = True,
    offload: str | None = None,
    key_map: dict[str, str] | None = None,
    loader: str = "streaming",
    reading: str | None = None,
) -> dict[str, Any]:
    """Load one folder both ways and return what differs; empty lists if nothing does."""
    config = deepspeed_config(dtype, threshold, offload)
    torch.manual_seed(1)
    mine = ours(kind, folder, config, dtype, key_map, loader, reading)
    torch.manual_seed(1)
    try:
        other = theirs(kind, folder, config, key_map)
    except Exception as error:
        return {
            "theirs": f"{type(error).__name__}: {error}"[:300],
            "differences": unlike_the_whole(kind, folder, dtype, key_map),
        }
    answer: dict[str, Any] = {
        "differences": [
            fault
            for fault in differences(mine, other)
            if loader == "streaming" or PADDING not in fault
        ]
    }
    if train:
        answer["losses"] = [_losses_or_why_not(model, kind, config) for model in (mine, other)]
        # DeepSpeed marks them in `initialize`.
        answer["persist"] = [[p.ds_persist for p in m.parameters()] for m in (mine, other)]
    del mine, other
    gc.collect()
    return answer


def many(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare many folders in one process group."""
    from llmload.builtin.zero3.process_group import connect

    connect()
    answers = []
    for case in cases:
        try:
            answers.append(compare(**case))
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"[:500]})
    return answers


def architecture(kind: str, model_type: str, folder: str, **case: Any) -> dict[str, Any]:
    """Build a type tiny on rank 0, save it to ``folder`` and compare; the folder is deleted."""
    if torch.distributed.get_rank() == 0:
        architectures.build(kind, model_type).save_pretrained(folder)
    torch.distributed.barrier()
    try:
        answer = compare(kind, folder, **case)
        if answer["differences"] and "theirs" not in answer:
            whole = architectures.AUTO_CLASSES[kind].from_pretrained(folder, dtype=case["dtype"])
            answer["whole"] = [
                f"{name}: buffer {buffer.dtype}" for name, buffer in whole.named_buffers()
            ]
        return answer
    finally:
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(folder)


def every(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare many types in one process group; an error stands in its case's place."""
    from llmload.builtin.zero3.process_group import connect

    connect()
    answers = []
    for case in cases:
        started = time.monotonic()
        try:
            answer = architecture(**case)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        answers.append(answer | {"seconds": round(time.monotonic() - started, 2)})
        print(case["kind"], case["model_type"], answer, flush=True)  # noqa: T201
    return answers


def unlike_the_whole(
    kind: str, folder: str, dtype: str, key_map: dict[str, str] | None = None
) -> list[str]:
    """Load partitioned and whole, gather each parameter, and list those that differ."""
    split = ours(kind, folder, deepspeed_config(dtype), dtype, key_map)
    spec = {"model": folder, "auto_class": kind, "dtype": dtype, "key_map": key_map or {}}
    whole = llmload.load(spec | {"strict": False}).model
    expected = dict(whole.named_parameters())
    different = sorted(expected.keys() ^ {name for name, _ in split.named_parameters()})
    for name, parameter in split.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            if not torch.equal(parameter, expected[name].to(parameter.dtype)):
                different.append(name)
    return different


def many_unlike_the_whole(cases: list[dict[str, Any]]) -> list[Any]:
    """Compare many folders in one process group; an error stands in its case's place."""
    from llmload.builtin.zero3.process_group import connect

    connect()
    answers: list[Any] = []
    for case in cases:
        try:
            answers.append(unlike_the_whole(**case))
        except Exception as error:
            answers.append(f"{type(error).__name__}: {error}")
    return answers
