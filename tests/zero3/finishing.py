"""Run on every rank: what comes after a partitioned load, held against the same load whole."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters
from torch import nn
from zero3.comparing import deepspeed_config, losses

import llmload
from llmload.host.registry import create_registry
from llmload.model import partitions

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def unlike_the_whole(spec: dict[str, Any], dtype: str) -> list[str]:
    """Load whole and partitioned, gather, and list the parameters that differ."""
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    split = llmload.load(spec | {"zero3": {"config": deepspeed_config(dtype)}}).model
    whole = llmload.load(spec).model
    expected = dict(whole.named_parameters())
    assert list(expected) == [name for name, _ in split.named_parameters()]
    different = []
    for name, parameter in split.named_parameters():
        assert parameter.numel() == 0, name
        with GatheredParameters(parameter):
            if not torch.equal(parameter, expected[name]):
                different.append(name)
    assert split.config.to_dict() == whole.config.to_dict()
    return different


def embeddings(folder: str, dtype: str) -> dict[str, Any]:
    spec = {
        "model": folder,
        "dtype": dtype,
        "tokenizer": {"add_tokens": ["<a>", "<b>"]},
        "embeddings": {"pad_to_multiple_of": 8, "init_new": "normal"},
        "dropout": {"p": 0.0},
        "gradient_checkpointing": {},
    }
    different = unlike_the_whole(spec, dtype)
    model = llmload.load(spec | {"zero3": {"config": deepspeed_config(dtype)}}).model
    return {"different": different, "losses": losses(model, "causal_lm", deepspeed_config(dtype))}


def lora(folder: str, dtype: str, adapter_dtype: str) -> dict[str, Any]:
    spec = {
        "model": folder,
        "dtype": dtype,
        "lora": {"r": 4, "target_modules": "all-linear", "adapter_dtype": adapter_dtype},
        "zero3": {"config": deepspeed_config(dtype)},
    }
    result = llmload.load(spec)
    dtypes = {str(p.dtype) for p in result.model.parameters() if p.requires_grad}
    report = result.report
    return {
        "dtypes": sorted(dtypes),
        "line": report.trainable_line(),
        "losses": losses(result.model, "causal_lm", deepspeed_config(dtype)),
    }


def untied_and_merged(folder: str, adapters: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Untie a tied model, and merge adapters into it, partitioned as in the whole."""
    lora = {"r": 2, "target_modules": ["q_proj"], "adapter_dtype": "bfloat16"}
    cases = {"untied": lora | {"tied_weights": "untie"}} | adapters
    found = {}
    for name, section in cases.items():
        spec = {"model": folder, "dtype": "bfloat16", "lora": section}
        torch.manual_seed(3)
        split = llmload.load(spec | {"zero3": {"config": deepspeed_config("bfloat16", 0)}}).model
        torch.manual_seed(3)
        whole = llmload.load(spec).model
        different = []
        for (mine, a), (its, b) in zip(
            split.named_parameters(), whole.named_parameters(), strict=True
        ):
            assert mine == its
            partitioned = a.numel() == 0
            with GatheredParameters([a]):
                if not torch.equal(a, b) or partitioned == ("lora_" in mine):
                    different.append(mine)
        found[name] = [different, split.config.tie_word_embeddings]
    return found


class ValueHead:
    """Adds a fresh head, and a buffer, in which every rank has drawn other values."""

    name = "value_head"
    after = ("zero3",)

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        hidden = partitions.shape(model.get_input_embeddings().weight)[1]
        head = nn.Linear(hidden, 1, dtype=ctx.dtype)
        head.register_buffer("scale", torch.rand(3))
        partitions.split(head, like=model)
        model.v_head = head
        for name in ("weight", "bias"):
            ctx.newly_initialised[f"v_head.{name}"] = "a fresh head"
        return model


class Scored(nn.Module):
    """A model with its head, as reward models are trained."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        hidden = self.model.model(input_ids=inputs["input_ids"]).last_hidden_state
        return (self.model.v_head(hidden).float().square().mean(),)


def value_head(folder: str, dtype: str) -> dict[str, Any]:
    """A head that a plugin adds comes out in parts of rank 0's values, and trains."""
    rank = int(torch.distributed.get_rank()) if torch.distributed.is_initialized() else 0
    torch.manual_seed(rank)
    spec = {"model": folder, "dtype": dtype, "zero3": {"config": deepspeed_config(dtype, 0)}}
    result = llmload.load(spec, registry=create_registry(plugins=[ValueHead()]))
    model, head = result.model, result.model.v_head
    answer: dict[str, Any] = {
        "partitioned": [partitions.is_partitioned(p) for p in head.parameters()],
        "empty": [p.numel() for p in head.parameters()],
        "shapes": [partitions.shape(p) for p in head.parameters()],
        "new": result.report.newly_initialised,
        "scale": head.scale.tolist(),
    }
    with GatheredParameters(list(head.parameters())):
        answer["values"] = [p.flatten().tolist() for p in head.parameters()]
    answer["losses"] = losses(Scored(model), "base", deepspeed_config(dtype, 0))
    return answer


def state_dict(folder: str, other: str, dtype: str) -> dict[str, Any]:
    """Load a file into a partitioned model; every parameter, part and buffer is the file's."""
    from safetensors.torch import load_file

    config = deepspeed_config(dtype)
    model = llmload.load({"model": folder, "dtype": dtype, "zero3": {"config": config}}).model
    model.register_buffer("seen", torch.zeros(3))
    state = load_file(f"{other}/model.safetensors") | {"seen": torch.arange(3.0)}
    refused = []
    for bad in (
        {"model.norm.weight": torch.ones(5)},
        {"model.norm.weights": torch.ones(16)},
    ):
        try:
            partitions.load_state_dict(model, state | bad)
        except llmload.CheckpointError as error:
            refused.append(str(error))
    lacking = {name: value for name, value in state.items() if name != "model.norm.weight"}
    told = partitions.load_state_dict(model, lacking | {"x": torch.ones(1)}, strict=False)
    partitions.load_state_dict(model, state)
    expected = llmload.load({"model": other, "dtype": dtype}).model
    different = []
    with GatheredParameters(list(model.parameters())):
        for name, parameter in expected.named_parameters():
            if not torch.equal(parameter, model.get_parameter(name)):
                different.append(name)
    empty = [p.numel() for p in model.parameters()]
    return {
        "different": different,
        "empty": sum(empty),
        "seen": model.seen.tolist(),
        "refused": refused,
        "told": told,
        "padding": [
            name for name, p in model.named_parameters() if partitions_padding(p).any().item()
        ],
    }


def partitions_padding(parameter: Any) -> torch.Tensor:
    """What fills up this rank's part."""
    found = partitions.held(parameter)
    assert found is not None
    return parameter.ds_tensor[found[0].numel() :]


def modules_to_save(folder: str, dtype: str) -> dict[str, Any]:
    """PEFT's copy of a partitioned module holds its values, and trains."""
    spec = {
        "model": folder,
        "dtype": dtype,
        "lora": {
            "r": 4,
            "target_modules": ["q_proj"],
            "modules_to_save": ["lm_head", "model.norm"],
            "adapter_dtype": "base",
        },
    }
    config = deepspeed_config(dtype)
    model = llmload.load(spec | {"zero3": {"config": config}}).model
    whole = llmload.load(spec).model
    copies, different = [], []
    for (name, mine), (_, other) in zip(
        model.named_parameters(), whole.named_parameters(), strict=True
    ):
        if "modules_to_save" not in name:
            continue
        copies.append((name, str(mine.dtype), mine.requires_grad))
        with GatheredParameters(mine) if partitions.is_partitioned(mine) else torch.no_grad():
            if not torch.equal(mine, other):
                different.append(name)
    found = losses(model, "causal_lm", config)
    return {"copies": copies, "different": different, "losses": found}


def resume(folder: str, adapter: str, dtype: str) -> dict[str, Any]:
    """A saved adapter, copies of whole modules included, goes on under ZeRO-3."""
    spec = {"model": folder, "dtype": dtype, "lora": {"adapter": adapter}}
    config = deepspeed_config(dtype)
    refused = ""
    try:  # the copy is in the model's dtype, as the saved adapter alone knows
        llmload.load(spec | {"zero3": {"config": config}})
    except (llmload.PlanError, llmload.LoadFailedError) as error:  # or the other rank's plan
        refused = str(error)
    spec["lora"] = {"adapter": adapter, "adapter_dtype": "base"}
    model = llmload.load(spec | {"zero3": {"config": config}}).model
    different = unlike(model, llmload.load(spec).model)
    found = losses(model, "causal_lm", config)
    return {"refused": refused, "different": different, "losses": found}


def unlike(split: Any, whole: Any) -> list[str]:
    """List the parameters, some of them partitioned, that differ from those of a whole model."""
    different = []
    for (name, mine), (_, other) in zip(
        split.named_parameters(), whole.named_parameters(), strict=True
    ):
        assert mine.requires_grad == other.requires_grad, name
        with GatheredParameters(mine) if partitions.is_partitioned(mine) else torch.no_grad():
            if not torch.equal(mine, other):
                different.append(name)
    return different


def starts(folder: str, dtype: str) -> dict[str, list[list[str]]]:
    """Adapters that start from the base's weights find them whole, and leave parts of what is left.

    :returns: by initialisation, the parameters unlike those of the whole model, and the parameters
        of its base that the initialisation changed.
    """
    answer = {}
    for start, keys in (
        ("pissa", {}),
        ("pissa_niter_4", {}),
        ("olora", {}),
        ("pissa_niter_4", {"coati": {}}),
    ):
        lora = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": start}
        lora["adapter_dtype"] = "base"
        spec = {"model": folder, "dtype": dtype, "lora": lora, **keys}
        torch.manual_seed(3)
        split = llmload.load(spec | {"zero3": {"config": deepspeed_config(dtype, 0)}}).model
        torch.manual_seed(3)
        whole = llmload.load(spec).model
        different = unlike(split, whole)
        stored = llmload.load({"model": folder, "dtype": dtype}).model
        base = whole.unload().named_parameters()
        pairs = zip(base, stored.parameters(), strict=True)
        changed = [name for (name, left), before in pairs if not torch.equal(left, before)]
        answer[" ".join((start, *keys))] = [different, changed]
    return answer


def disk(folder: str, path: str, dtype: str) -> dict[str, Any]:
    """Partitions large enough for DeepSpeed lie on the disk, hold the file's values, and train."""
    config = deepspeed_config(dtype, 0, "nvme")
    config["zero_optimization"]["offload_param"] |= {"nvme_path": path, "buffer_size": 2**22}
    result = llmload.load({"model": folder, "dtype": dtype, "zero3": {"config": config}})
    whole = llmload.load({"model": folder, "dtype": dtype}).model
    away = [p for p in result.model.parameters() if partitions.held(p) is None]
    answer = {
        "loader": result.report.loader,
        "away": len(away),
        "bytes": sum(f.stat().st_size for f in Path(path).rglob("*") if f.is_file()),
        "partitions": sum(p.ds_tensor.ds_numel * p.element_size() for p in away),
    }
    refused = {name: p.detach() for name, p in whole.named_parameters()}
    try:
        partitions.load_state_dict(result.model, refused)
    except llmload.CheckpointError as error:
        answer["refused"] = str(error.problems[0])
    different = []
    for (name, mine), (_, other) in zip(
        result.model.named_parameters(), whole.named_parameters(), strict=True
    ):
        with GatheredParameters(mine):
            if not torch.equal(mine, other):
                different.append(name)
    answer["different"] = different
    answer["losses"] = losses(result.model, "causal_lm", config)
    answer["whole"] = losses(
        llmload.load(
            {"model": folder, "dtype": dtype, "zero3": {"config": deepspeed_config(dtype, 0)}}
        ).model,
        "causal_lm",
        deepspeed_config(dtype, 0),
    )
    return answer
