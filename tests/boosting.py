"""One load that stays lazy, boosted on every rank and held against an eager load.

Run by ``torchrun`` from :mod:`test_colossalai_booster`; prints one JSON object a rank.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

warnings.simplefilter("ignore")  # colossalai names what else could be installed

import colossalai  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from colossalai.booster import Booster  # noqa: E402
from colossalai.booster.plugin import HybridParallelPlugin  # noqa: E402

import llmload  # noqa: E402

LEARNING_RATE = 0.1


def main(spec: dict[str, Any], options: dict[str, Any], step: bool) -> dict[str, Any]:
    colossalai.launch_from_torch(backend="gloo", seed=1, verbose=False)
    torch.manual_seed(0)
    lazy = llmload.load({**spec, "colossalai": {"materialize": False}}).model
    torch.manual_seed(0)
    eager = llmload.load(spec).model
    was_lazy = sum(type(p).__name__ == "LazyTensor" for p in lazy.parameters())
    plugin = HybridParallelPlugin(tp_size=1, **options)
    booster = Booster(plugin=plugin)
    optimiser = torch.optim.SGD(trainable(lazy), lr=LEARNING_RATE) if step else None
    boosted, optimiser, *_ = booster.boost(lazy, optimiser)
    held = boosted.unwrap(False)
    found = {
        "rank": dist.get_rank(),
        "lazy": was_lazy,
        "tensors": len(tensors(held)),
        "different": different(held, eager),
    }
    if step:
        ids = torch.arange(4, 20).reshape(2, 8)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        theirs = torch.optim.SGD(trainable(eager), lr=LEARNING_RATE)
        loss = boosted.train()(**batch).loss
        booster.backward(loss, optimiser)
        optimiser.step()
        expected = eager.train()(**batch).loss
        expected.backward()
        theirs.step()
        found["losses"] = [loss.item(), expected.item()]
        found["different after a step"] = different(held, eager)
    dist.barrier()
    dist.destroy_process_group()
    return found


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What this rank holds of the model: a pipeline stage leaves out the others' layers."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def different(model: torch.nn.Module, reference: torch.nn.Module) -> list[str]:
    expected = tensors(reference)
    return [
        name
        for name, tensor in tensors(model).items()
        if tensor.dtype != expected[name].dtype or not torch.equal(tensor, expected[name])
    ]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(**json.loads(sys.argv[1]))) + "\n")
