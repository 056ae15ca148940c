"""Loads, each boosted on every rank and held against an ordinary one.

Run by ``torchrun`` from :mod:`test_colossalai_booster`; prints one JSON object a rank and job.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")  # colossalai names what else could be installed

import colossalai  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from colossalai.booster import Booster  # noqa: E402
from colossalai.booster import plugin as plugins  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import llmload  # noqa: E402

LEARNING_RATE = 0.1
ON_GPU = torch.cuda.is_available()


def main(jobs: list[dict[str, Any]]) -> None:
    colossalai.launch_from_torch(backend="nccl" if ON_GPU else "gloo", seed=1, verbose=False)
    for number, job in enumerate(jobs):
        answer = {"rank": dist.get_rank(), "job": number, **boosted_and_compared(**job)}
        sys.stdout.write(json.dumps(answer) + "\n")
        dist.barrier()
    dist.destroy_process_group()


def boosted_and_compared(
    spec: dict[str, Any], plugin: str, options: dict[str, Any], materialize: bool, step: bool
) -> dict[str, Any]:
    torch.manual_seed(0)
    section = {"materialize": materialize, "plugin": plugin, "tp_size": options.get("tp_size", 1)}
    model = llmload.load({**spec, "colossalai": section}).model
    torch.manual_seed(0)
    eager = llmload.load(spec).model
    was_lazy = sum(type(p).__name__ == "LazyTensor" for p in model.parameters())
    booster = Booster(plugin=getattr(plugins, plugin)(**options))
    optimiser = torch.optim.SGD(trainable(model), lr=LEARNING_RATE) if step else None
    boosted, optimiser, *_ = booster.boost(model, optimiser)
    held = boosted.unwrap(False) if plugin == "HybridParallelPlugin" else boosted.unwrap()
    found: dict[str, Any] = {"lazy": was_lazy, "tensors": len(tensors(held))}
    if ON_GPU:  # where it may be cut up, so that only what is saved can be compared
        found["different when saved"] = different_when_saved(booster, boosted, eager)
        eager.cuda()
    else:
        found["different"] = different(held, eager)
    if step:
        ids = torch.arange(4, 20, device=next(eager.parameters()).device).reshape(2, 8)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        theirs = torch.optim.SGD(trainable(eager), lr=LEARNING_RATE)
        loss = boosted.train()(**batch).loss
        booster.backward(loss, optimiser)
        optimiser.step()
        expected = eager.train()(**batch).loss
        expected.backward()
        theirs.step()
        found["losses"] = [loss.item(), expected.item()]
        if not ON_GPU:
            found["different after a step"] = different(held, eager)
    return found


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What this rank holds of the model: a pipeline stage leaves out the others' layers."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def different(model: torch.nn.Module, reference: torch.nn.Module) -> list[str]:
    return _different(tensors(model), tensors(reference))


def different_when_saved(booster: Booster, boosted: Any, reference: Any) -> list[str]:
    """Save through the Booster, which gathers what was cut up, and compare what was written."""
    place = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(place)
    folder = Path(str(place[0]))
    booster.save_model(boosted, folder, shard=True, use_safetensors=True)
    dist.barrier()
    saved = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    assert saved
    return _different(saved, dict(reference.state_dict()))


def _different(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    return [
        name
        for name, tensor in found.items()
        if tensor.dtype != expected[name].dtype or not torch.equal(tensor, expected[name])
    ]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
