"""A saved adapter: one JSON file that says what it is, and its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from pydantic import ValidationError

from llmload.plugin import (
    Checkpoint,
    CheckpointError,
    MappedCheckpoint,
    Problem,
    UntrustedFolder,
    explain,
    local_path,
    partitions,
    rank,
    torch_dtype,
    version_of,
)
from llmload_bottleneck.layers import bottlenecks, weights
from llmload_bottleneck.section import Shape

if TYPE_CHECKING:
    from torch import nn

CONFIG: Final = "bottleneck_config.json"
WEIGHTS: Final = "bottleneck_model.safetensors"


def save(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter of a loaded model to a folder, for ``bottleneck: {adapter: ...}``.

    Under ZeRO-3 every rank calls it, before or after DeepSpeed's ``initialize``, and rank 0 writes.

    :raises ValueError: the model has no such adapter.
    """
    from safetensors.torch import save_file

    layers = dict(bottlenecks(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no bottleneck adapter to save")
    shape = next(iter(layers.values())).shape
    content = {
        "made_by": f"llmload-bottleneck {version_of('llmload-bottleneck')}",
        "base": getattr(getattr(model, "config", None), "name_or_path", ""),
        "shape": shape.model_dump(mode="json", include=set(Shape.model_fields)),
    }
    parameters = weights(model)
    with _gathered(parameters.values()):
        state = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
        if rank() == 0:
            place = Path(folder)
            place.mkdir(parents=True, exist_ok=True)
            (place / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            save_file({n: t.contiguous() for n, t in state.items()}, place / WEIGHTS)


@contextmanager
def _gathered(parameters: Any) -> Iterator[None]:
    held = [parameter for parameter in parameters if partitions.is_partitioned(parameter)]
    if not held:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(held):
        yield


@dataclass(frozen=True, kw_only=True)
class Saved:
    """An adapter in a folder, checked, its weights not read."""

    folder: Path
    shape: Shape
    checkpoint: Checkpoint
    """Names, shapes and dtypes of its weights."""
    files: UntrustedFolder

    def state(self) -> dict[str, torch.Tensor]:
        """Return the weights, the caller's own."""
        with MappedCheckpoint(self.checkpoint) as mapped:
            found = {n: mapped.tensor(i).clone() for n, i in self.checkpoint.tensors.items()}
            mapped.check()
        return found

    def outline(self) -> dict[str, torch.Tensor]:
        """Return them without storage: nothing is read."""
        return {
            name: torch.empty(info.shape, device="meta")
            for name, info in self.checkpoint.tensors.items()
        }


def open_saved(text: str) -> Saved:
    """Describe the adapter in a folder, reading its config and headers.

    :raises CheckpointError: a file is missing, damaged, or not what an adapter's is.
    """
    folder = local_path(text, "bottleneck.adapter")
    files = UntrustedFolder(folder)
    for name in (CONFIG, WEIGHTS):
        if not files.holds(name):
            raise CheckpointError(
                Problem(
                    where="bottleneck.adapter",
                    message=f"the folder {text!r} holds no {name}",
                    fix="Give a folder written by llmload_bottleneck.save.",
                )
            )
    shape = _shape(files, files.config(CONFIG, "the adapter's config"))
    files.path(WEIGHTS)  # which no link may lead out of the folder
    checkpoint = Checkpoint.open(folder / WEIGHTS)
    for name, info in checkpoint.tensors.items():
        dtype = torch_dtype(info.dtype)
        if dtype is None or not dtype.is_floating_point:
            raise files.refusal(WEIGHTS, f"{name!r} is stored as {info.dtype}, which is no float")
    return Saved(folder=folder, shape=shape, checkpoint=checkpoint, files=files)


def _shape(files: UntrustedFolder, content: Mapping[str, Any]) -> Shape:
    data = content.get("shape")
    try:
        return Shape.model_validate(data)
    except ValidationError as error:
        file = str(files.root / CONFIG)
        problems = explain(error, Shape, data, within=("shape",), spellings={})
        raise CheckpointError(p.model_copy(update={"file": file}) for p in problems) from None
