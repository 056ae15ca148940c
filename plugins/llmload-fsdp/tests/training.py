"""Run on every rank: sharded models saved, loaded again, and trained by others' trainers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import alone, facts, losses, unlike, wholes

import llmload
from llmload.testing import SENTENCES

LORA = {"target_modules": "all-linear"}
ROWS = [list(range(3 + row, 15 + row)) for row in range(8)]
OPTIONS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 1,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "learning_rate": 0.1,
    "use_cpu": True,
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
}


def sharded(folder: str, *, adapter: bool) -> llmload.LoadResult:
    torch.manual_seed(int(os.environ["RANK"]))
    spec = {"model": folder, "parallel": {}} | ({"lora": LORA} if adapter else {})
    return llmload.load(spec)


def again(folder: str, out: str, *, adapter: bool) -> Any:
    """Load what was saved, unsharded."""
    dist.barrier()  # rank 0 may still write
    with alone():
        spec = {"model": folder, "lora": {"adapter": out}} if adapter else {"model": out}
        return llmload.load(spec).model


def saved(folder: str, out: str, *, adapter: bool) -> dict[str, Any]:
    """Train in a plain loop, save on all ranks, and load again unsharded."""
    model = sharded(folder, adapter=adapter).model
    found = losses(model, 2)
    model.save_pretrained(out)
    files = sorted(path.name for path in Path(out).iterdir())
    return {
        "losses": found,
        "unlike": unlike(model, again(folder, out, adapter=adapter)),
        "files": files,
    }


def by_trainer(folder: str, out: str, *, adapter: bool, model: Any = None) -> dict[str, Any]:
    """Train with transformers' Trainer, a model of ours where none is given."""
    from transformers import Trainer

    model = model or sharded(folder, adapter=adapter).model
    data = [{"input_ids": row, "labels": row} for row in ROWS]
    return _trained(lambda a: Trainer(model, a, train_dataset=data), folder, out, adapter=adapter)


def by_trl(folder: str, out: str, *, adapter: bool, model: Any = None) -> dict[str, Any]:
    """Train with TRL's SFTTrainer, a model of ours where none is given."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    model = model or sharded(folder, adapter=adapter).model
    data = Dataset.from_list([{"input_ids": row} for row in ROWS])

    def make(arguments: Any) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)

    return _trained(make, folder, out, adapter=adapter, trl=True)


def _trained(
    make: Callable[[Any], Any], folder: str, out: str, *, adapter: bool, trl: bool = False
) -> dict[str, Any]:
    from transformers import TrainingArguments

    if trl:
        from trl import SFTConfig

        own = {
            "bf16": False,
            "gradient_checkpointing": False,
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }
        trainer = make(SFTConfig(out, **OPTIONS, **own))
    else:
        trainer = make(TrainingArguments(out, **OPTIONS))
    before = wholes(trainer.model)
    trainer.train()
    moved = {name for name, _ in wholes(trainer.model).items() ^ before.items()}
    trainer.save_model(out)
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": history,
        "moved": len(moved),
        "unlike": unlike(trainer.model, again(folder, out, adapter=adapter)),
    }


def by_accelerate(folder: str) -> dict[str, Any]:
    """Hand a sharded model to what accelerate prepares FSDP2 models with."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    model = sharded(folder, adapter=True).model
    before = facts(model)
    prepared = fsdp2_prepare_model(None, model)
    return {
        "itself": prepared is model,
        "as it was": facts(prepared) == before,
        "losses": losses(prepared),
    }


def generated(folder: str) -> dict[str, Any]:
    """Generate before anything else, run without the adapter, and train then."""
    model = sharded(folder, adapter=True).model
    with alone():
        plain = llmload.load({"model": folder}).model
    ids = torch.arange(3, 9)[None]
    options = {"max_new_tokens": 4, "do_sample": False}
    tokens = model.generate(input_ids=ids, **options).tolist()
    with torch.no_grad(), model.disable_adapter():
        logits = model(ids).logits
    return {
        "tokens": tokens == plain.generate(input_ids=ids, **options).tolist(),
        "logits": torch.equal(logits, plain(ids).logits),
        "losses": losses(model, 1),
    }


PAIRS = [
    {"prompt": text, "chosen": f" {other}", "rejected": " the fox"}
    for text, other in zip(SENTENCES, SENTENCES[::-1], strict=True)
]


def members(folder: str, reference: dict[str, Any], *, adapter: bool) -> dict[str, Any]:
    """Load a sharded policy and its reference as a group."""
    torch.manual_seed(dist.get_rank())
    policy = {"model": folder, "parallel": {}} | ({"lora": LORA} if adapter else {})
    group = llmload.load_group({"models": {"policy": policy, "reference": reference}})
    return {"model": group["policy"].model, "ref_model": group["reference"].model}


def by_dpo(folder: str, out: str) -> dict[str, dict[str, Any]]:
    """Train with TRL's DPOTrainer: each kind of reference, and models of transformers' own."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    frozen = {"model": folder, "trainable": False}
    ways: dict[str, dict[str, Any]] = {
        "both sharded": members(folder, frozen | {"parallel": {}}, adapter=False),
        "a whole reference": members(folder, frozen, adapter=False),
        "adapter off": members(folder, {"adapter_of": "policy"}, adapter=True),
        "theirs": {
            name: AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="float32",
                distributed_config=DistributedConfig(fsdp_size=dist.get_world_size()),
            )
            for name in ("model", "ref_model")
        },
    }
    return {
        way: _preferring(handed, folder, f"{out}/{way}", adapter=way == "adapter off")
        for way, handed in ways.items()
    }


def _preferring(handed: dict[str, Any], folder: str, out: str, *, adapter: bool) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(out, **OPTIONS, bf16=False, gradient_checkpointing=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = Dataset.from_list(PAIRS)
    trainer = DPOTrainer(args=arguments, train_dataset=data, processing_class=tokenizer, **handed)
    trainer.train()
    trainer.save_model(out)
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "unlike": unlike(trainer.model, again(folder, out, adapter=adapter)),
    }
