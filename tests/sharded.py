"""Run on every rank: quantised models that DeepSpeed or FSDP shards, and how they train."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from quantised import plain, unlike
from torch import nn
from transformers.integrations import HfDeepSpeedConfig
from zero3.comparing import deepspeed_config, losses

import llmload
from llmload.model import partitions

warnings.filterwarnings("ignore")

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
SECTION: dict[str, Any] = {"quant_type": "nf4", "double_quant": True}


def zero3(
    folder: str, storage: str | None, offload: str | None, block: bool, cache: str | None
) -> dict[str, Any]:
    """Load for ZeRO-3, hold every part against transformers' whole model, and train both ways."""
    config = deepspeed_config("bfloat16", 0)
    if offload is not None:
        config["zero_optimization"]["offload_param"] = {"device": offload, "pin_memory": False}
    section = SECTION if storage is None else SECTION | {"quant_storage": storage}
    kept = {} if cache is None else {"cache": {"folder": cache}}
    spec = {
        "model": folder,
        "dtype": "bfloat16",
        "kbit": section | kept,
        "lora": LORA | {"adapter_dtype": "bfloat16"},
        "zero3": {"config": config},
    }
    registry = llmload.create_registry(block={"streaming"} if block else ())
    torch.manual_seed(5)
    ours = llmload.load(spec, registry=registry)
    wanted = section | {"quant_storage": storage or "bfloat16"}
    alive = HfDeepSpeedConfig(config)
    whole = plain(Path(folder), wanted)
    torch.manual_seed(5)
    theirs = peft.get_peft_model(whole, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
    for parameter in theirs.parameters():
        if parameter.requires_grad:  # as the adapter's dtype is asked for
            parameter.data = parameter.data.bfloat16()
    report = ours.report
    answer: dict[str, Any] = {
        "loader": report.loader,
        "different": _different(ours.model, theirs),
        "facts": {
            k: v for k, v in report.facts["kbit"].items() if k not in ("quantised_by", "cache")
        },
        "cache": report.facts["kbit"].get("cache"),
        "quantised": report.facts["kbit"].get("quantised_by"),
        "warnings": report.warnings,
        "planned": ours.plan.facts["kbit"],
        "held": _held_bytes(ours.model),
        "line": report.trainable_line(),
    }
    trained = [losses(model, "causal_lm", config) for model in (ours.model, theirs)]
    del alive
    return answer | {"losses": trained}


def _different(mine: Any, other: Any) -> list[str]:
    """List what of a model whose base may be partitioned is not as in the whole one."""
    found = []
    for (name, a), (also, b) in zip(mine.named_parameters(), other.named_parameters(), strict=True):
        assert name == also
        held = partitions.held(a)
        assert held is not None
        flat, first = held
        part = b.detach().reshape(-1)[first : first + flat.numel()]
        if (a.dtype, partitions.shape(a)) != (b.dtype, tuple(b.shape)):
            found.append(f"{name}: {a.dtype} {partitions.shape(a)}")
        elif not torch.equal(flat.view(torch.uint8), part.view(torch.uint8)):
            found.append(name)
        if (a.requires_grad, type(a)) != (b.requires_grad, type(b)):
            found.append(f"{name}: {type(a)}")
        if hasattr(b, "quant_state"):
            state, expected = (p.quant_state.as_dict(packed=True) for p in (a, b))
            found += [f"{name}: {k}" for k in expected if not torch.equal(state[k], expected[k])]
    return found


def _held_bytes(model: nn.Module) -> int:
    """Bytes of 4-bit codes in this process."""
    codes = [p for p in model.parameters() if type(p).__name__ == "Params4bit"]
    return sum(partitions.held(p)[0].nbytes for p in codes)  # type: ignore[index]


def zero3_refusals(folder: str) -> list[list[str]]:
    """What the plan says of what ZeRO-3 cannot have."""
    base = {"model": folder, "dtype": "bfloat16"}
    base |= {"zero3": {"config": deepspeed_config("bfloat16", 0)}}
    sections: list[dict[str, Any]] = [
        {"bits": 8},
        {"quant_storage": "float16"},
        {"prepare": "legacy"},
        {"cast": {"norms": "float32"}},
    ]
    return [
        [str(problem) for problem in llmload.plan(base | {"kbit": section}).errors]
        for section in sections
    ]


def fsdp(folder: str, version: int) -> dict[str, Any]:
    """Shard a model that was loaded as for FSDP, and train it beside an unsharded one."""
    dist.init_process_group("gloo")
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    spec = {"model": folder, "dtype": "bfloat16", "kbit": SECTION}
    spec |= {"lora": LORA | {"adapter_dtype": "bfloat16"}}

    def loaded() -> Any:
        torch.manual_seed(5)
        return llmload.load(spec).model

    model, whole = loaded(), loaded()
    answer: dict[str, Any] = {
        "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
        "same": unlike(model.get_base_model(), whole.get_base_model()),
    }
    sharded = _shard(model, version)
    answer["held"] = sum(_local(p).numel() for p in sharded.parameters())
    answer["whole"] = sum(p.numel() for p in whole.parameters())
    answer["losses"] = [_steps(sharded, None), _steps(whole, dist.get_world_size())]
    dist.destroy_process_group()
    return answer


def _shard(model: Any, version: int) -> Any:
    layers = model.get_base_model().model.layers
    if version == 2:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({type(layers[0])}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def _local(parameter: Any) -> Any:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _steps(model: Any, ranks: int | None) -> list[float]:
    """Train two steps; without sharding, on the mean of all ranks' gradients."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids = torch.arange(4, 20).reshape(2, 8) + dist.get_rank()
    found = []
    for _ in range(2):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        for parameter in model.parameters():
            if ranks is not None and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= ranks
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found
