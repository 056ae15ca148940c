"""Run on every rank: loads, and what the tests compare of them."""

from __future__ import annotations

import hashlib
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import llmload

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank has of a parameter or buffer."""
    held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return held.detach()


def digest(tensor: torch.Tensor) -> str:
    """Return the shape, dtype and bytes of a tensor in short."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(data).hexdigest()[:16]}"


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a parameter, on every rank."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def wholes(model: torch.nn.Module) -> dict[str, str]:
    """Return digests of all parameters and buffers, whole."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: digest(whole(tensor)) for name, tensor in named}


def losses(model: Any, steps: int = 3, lr: float = 0.1) -> list[float]:
    """Train for some steps on the same tokens on all ranks, and return the losses."""
    torch.manual_seed(0)
    # Without dropout nothing is drawn. Outside of training bitsandbytes wants larger layers.
    model.train(getattr(model, "is_loaded_in_4bit", False))
    ids = torch.randint(3, 30, (1, 12))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr)
    found = []
    for _ in range(steps):
        labels = ids[:, 0] % 2 if hasattr(model, "num_labels") and sequence(model) else ids
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def sequence(model: Any) -> bool:
    """Say whether the model has one label for a row."""
    return "SequenceClassification" in type(model).__name__


def facts(model: Any) -> dict[str, Any]:
    """Return what this rank holds of a model, by name."""
    return {
        "parameters": {n: digest(local(p)) for n, p in model.named_parameters()},
        "buffers": {n: digest(local(b)) for n, b in model.named_buffers()},
        "ties": ties(model),
    }


def ties(model: Any) -> list[list[str]]:
    """Return the names of parameters that have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(group for group in names.values() if len(group) > 1)


def units(model: Any) -> list[str]:
    """Return the names of the modules that FSDP2 manages."""
    from torch.distributed.fsdp import FSDPModule

    return sorted(name for name, m in model.named_modules() if isinstance(m, FSDPModule))


def ours(spec: dict[str, Any], steps: int = 3) -> dict[str, Any]:
    """Load as the spec says, and train."""
    result = llmload.load(spec)
    found = facts(result.model) | {"units": units(result.model)}
    found["report"] = result.report.facts["parallel"]
    files = result.report.facts["streaming"]["files"]
    found["bytes read"] = sum(file["bytes_read"] for file in files.values())
    found["bytes there"] = sum(file["tensor_bytes"] for file in files.values())
    said = " ".join(str(step) for step in result.plan.steps)
    found["bytes planned"] = int(re.search(r"read ([\d,]+) of", said)[1].replace(",", ""))
    found["kept planned"] = kept(result)
    found["losses"] = losses(result.model, steps) if steps else []
    return found


def kept(result: llmload.LoadResult) -> int:
    """Return the bytes of parameters that the plan foretells of the first rank, which has most."""
    memory = result.plan.memory
    assert memory is not None
    return sum(route.kept_bytes for route in memory.routes)


def many(function: Any, asked: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Call a function for each of several specs; what one raises stands in its place."""
    found = {}
    for name, spec in asked.items():
        try:
            found[name] = function(spec)
        except Exception:
            found[name] = traceback.format_exc()
    return found


def ours_beside_theirs(spec: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load as the spec says, and as transformers does by itself."""
    copies = spec["parallel"].get("dp_replicate_size", 1)
    sizes = {"fsdp_size": dist.get_world_size() // copies, "dp_replicate_size": copies}
    return ours(spec), theirs(spec["model"], sizes)


def theirs(folder: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Load as transformers does by itself, and train."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", distributed_config=DistributedConfig(**sizes)
    )
    return facts(model) | {"units": units(model), "losses": losses(model)}


def beside_unsharded(spec: dict[str, Any], steps: int = 3) -> dict[str, Any]:
    """Load on all ranks, each with another random stream, and the same unsharded on this one."""
    torch.manual_seed(dist.get_rank())
    sharded = llmload.load(spec)
    torch.manual_seed(0)  # rank 0's draws are for all
    with alone():
        plain = llmload.load({key: value for key, value in spec.items() if key != "parallel"})
    names = [name for name, _ in plain.model.named_parameters()]
    found = {
        "names": [name for name, _ in sharded.model.named_parameters()] == names,
        "unlike": unlike(sharded.model, plain.model),
        "statistics": statistics(sharded.model) == statistics(plain.model),
        "trainable": trainable(sharded.model) == trainable(plain.model),
        "spread": all(isinstance(p, DTensor) for p in sharded.model.parameters()),
        "units": units(sharded.model),
        "new": sorted(sharded.report.newly_initialised),
        "new there": sorted(plain.report.newly_initialised),
        "ties": ties(sharded.model) == ties(plain.model),
        "kept": sharded.report.facts["parallel"]["shard_bytes"],
        "kept planned": kept(sharded),
    }
    if steps:
        found["losses"] = losses(sharded.model, steps)
        found["losses there"] = losses(plain.model, steps)
        found["unlike when trained"] = unlike(sharded.model, plain.model)
    return found


def statistics(model: Any) -> dict[str, list[str]]:
    """Return digests of what bitsandbytes keeps beside the codes of each layer."""
    found = {}
    for name, module in model.named_modules():
        state = getattr(module, "quant_state", None)
        if state is not None:
            second = [] if state.state2 is None else [state.state2.absmax, state.offset]
            found[name] = [digest(tensor) for tensor in (state.absmax, state.code, *second)]
    return found


def trainable(model: Any) -> dict[str, str]:
    return {n: str(p.dtype) for n, p in model.named_parameters() if p.requires_grad}


def unlike(one: Any, other: Any) -> list[str]:
    """Return the names of parameters and buffers that differ, each whole."""
    mine, yours = wholes(one), wholes(other)
    return sorted(name for name, _ in mine.items() ^ yours.items())


@contextmanager
def alone() -> Iterator[None]:
    """Let this process look like one that no launcher has started."""
    import os

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(kept)


def layers_in_parts(spec: dict[str, Any]) -> dict[str, Any]:
    """Load with tensor or expert parallel, as transformers does by itself, and unsharded."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    result = llmload.load(spec)
    config = DistributedConfig(**spec["parallel"])
    theirs = AutoModelForCausalLM.from_pretrained(spec["model"], distributed_config=config)
    with alone():
        plain = llmload.load({"model": spec["model"]}).model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 30, (1, 12), generator=generator)
    with torch.no_grad():
        far = (result.model(ids).logits - plain(ids).logits).abs().max().item()
    return {
        "as theirs": facts(result.model) == facts(theirs),
        "unlike": unlike(result.model, plain),
        "far": far,
        "split": sorted(n for n, p in result.model.named_parameters() if isinstance(p, DTensor)),
        "report": result.report.facts["parallel"],
        "loader": result.report.loader,
    }


def planned(spec: dict[str, Any]) -> list[str]:
    """Return the errors of a plan."""
    return [str(problem) for problem in llmload.plan(spec).errors]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 9)[None]).logits
    return found


def grouped(spec: dict[str, Any]) -> dict[str, Any]:
    """Load a group, train its policy, and hold its reference to the checkpoint."""
    group = llmload.load_group(spec)
    policy, reference = group["policy"].model, group["reference"].model
    with alone():
        plain = llmload.load({"model": spec["models"]["policy"]["model"]}).model
    wanted = logits(plain)
    found: dict[str, Any] = {
        "policy sharded": any(isinstance(p, DTensor) for p in policy.parameters()),
        "reference sharded": any(isinstance(p, DTensor) for p in reference.parameters()),
        "before": torch.equal(logits(reference), wanted),
        "losses": losses(policy, 2),
    }
    found["after"] = torch.equal(logits(reference), wanted)
    return found | {"policy moved": not torch.equal(logits(policy), wanted)}


def faultless(spec: dict[str, Any]) -> dict[str, Any]:
    """Load on all ranks and unsharded, and return what the faults would show in."""
    torch.manual_seed(dist.get_rank())
    result = llmload.load(spec)
    torch.manual_seed(0)
    with alone():
        plain = llmload.load({key: value for key, value in spec.items() if key != "parallel"}).model
    model, files = result.model, result.report.facts["streaming"]["files"].values()
    named = dict(model.named_parameters())
    held = [*named.values(), *model.buffers()]
    said = " ".join(str(step) for step in result.plan.steps)
    found = {
        "whole": [n for n, p in named.items() if p.shape[0] > 1 and local(p).shape == p.shape],
        "elements": sum(local(p).numel() for p in named.values()),
        "elements of the model": sum(p.numel() for p in named.values()),
        "not finite": [str(t.shape) for t in held if not local(t).isfinite().all()],
        "buffers": {n: digest(b) for n, b in model.named_buffers()},
        "buffers there": {n: digest(b) for n, b in plain.named_buffers()},
        "adapter": {n: digest(whole(p)) for n, p in named.items() if "lora_" in n},
        "adapter there": {n: digest(p) for n, p in plain.named_parameters() if "lora_" in n},
        "frozen dtypes": sorted({str(p.dtype) for p in named.values() if not p.requires_grad}),
        "trained dtypes": sorted({str(p.dtype) for p in named.values() if p.requires_grad}),
        "rows": model.get_input_embeddings().weight.shape[0],
        "rows there": plain.get_input_embeddings().weight.shape[0],
        "unlike": unlike(model, plain),
        "bytes read": sum(file["bytes_read"] for file in files),
        "bytes there": sum(file["tensor_bytes"] for file in files),
        "bytes planned": int(re.search(r"read ([\d,]+) of", said)[1].replace(",", "")),
    }
    losses(model, 2)
    return found | {"ties": ties(model), "ties there": ties(plain)}


def without_streaming(folder: str) -> dict[str, Any]:
    """Load where no loader asks for rows: from_pretrained loads the whole on every rank."""
    registry = llmload.create_registry(block={"streaming"})
    result = llmload.load({"model": folder, "parallel": {}}, registry=registry)
    with alone():
        plain = llmload.load({"model": folder}).model
    warned = [str(warning) for warning in result.plan.warnings]
    return {"unlike": unlike(result.model, plain), "warnings": warned}


def lost_rank(folder: str) -> str:
    """Load, where a plugin fails on rank 1 alone; return what each rank is told."""

    class Disk:
        name = "disk"
        stage = "model"

        @llmload.hookimpl
        def post_load(self, ctx: Any, model: Any) -> Any:
            if dist.get_rank() == 1 and not ctx.rehearsing:
                raise OSError("the disk of this rank is gone")
            return model

    registry = llmload.create_registry([Disk()])
    try:
        llmload.load({"model": folder, "parallel": {"deadline": 20.0}}, registry=registry)
    except llmload.LoadFailedError as error:
        return str(error)
    return "it loaded"
