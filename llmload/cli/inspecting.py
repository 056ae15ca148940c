"""What a model is made of, before anything of it is read: its files, its tensors, its modules."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from llmload.hf import installed_transformers
from llmload.loading import planning
from llmload.spec.wording import pattern

if TYPE_CHECKING:
    from torch import nn

    from llmload.host.registry import Registry
    from llmload.spec.loadspec import LoadSpec

_OF_CONFIG = (
    "model_type",
    "architectures",
    "dtype",
    "torch_dtype",
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "quantization_config",
)
"""Keys of config.json that are shown, where it has them."""


class StoredTensor(BaseModel):
    """One tensor of a checkpoint, as its header tells."""

    name: str
    """As in the file."""
    dtype: str
    """As safetensors spells it: ``BF16``."""
    shape: tuple[int, ...]
    """Empty for a single value."""
    nbytes: int
    """Bytes in the file."""
    file: str
    """Name in the folder."""


class Inspection(BaseModel):
    """What lies in the folder of a model."""

    model: str
    """As the spec names it."""
    folder: str
    """Where it lies; for a model of the hub the snapshot, whose name is the commit."""
    config: dict[str, Any]
    """What its config says of kind and size."""
    files: dict[str, int]
    """Name of each file of weights -> bytes."""
    to_fetch: dict[str, int]
    """Those of them that are not here yet."""
    tensors: list[StoredTensor]
    """File by file, each in the order of its bytes."""

    def by_dtype(self) -> dict[str, tuple[int, int]]:
        """Return dtype -> number of elements and of bytes."""
        found: dict[str, tuple[int, int]] = {}
        for tensor in self.tensors:
            elements, nbytes = found.get(tensor.dtype, (0, 0))
            found[tensor.dtype] = (
                elements + math.prod(tensor.shape),
                nbytes + tensor.nbytes,
            )
        return found


class Modules(BaseModel):
    """Modules of one class whose names differ in their numbers only."""

    pattern: str
    """Their names, with ``*`` for the numbers."""
    kind: str
    """The class."""
    names: list[str]
    """All of them, in the order of the model."""
    shapes: dict[str, list[tuple[int, ...]]]
    """Name of each parameter of their own -> the shapes that it has, each once."""
    parameters: int
    """Elements in all of them; a tied one counts where it comes first."""
    nbytes: int
    """Bytes of the same, at the dtype that the spec asks for."""
    adapted: int
    """How many of them the spec's `lora` would take."""


class Targets(BaseModel):
    """What an adapter could go on."""

    model_class: str
    """Of the model before any plugin changes it."""
    modules: list[Modules]
    """In the order of the model."""


def inspect(spec: LoadSpec, registry: Registry) -> Inspection:
    """Describe files and tensors by config and headers.

    :raises RequestError: the folder is no model's, or what lies in it is damaged or unsafe.
    """
    found = planning.find(registry.activate(spec), spec, planning.Download.NOTHING)
    checkpoint = found.checkpoint
    stored = checkpoint.tensors.values() if checkpoint is not None else ()
    files = checkpoint.files if checkpoint is not None else ()
    names = {file.path: file.name for file in files}
    return Inspection(
        model=str(spec.model),
        folder=str(found.folder),
        config={key: found.content[key] for key in _OF_CONFIG if found.content.get(key)},
        files={file.name: file.size for file in files},
        to_fetch=checkpoint.to_fetch if checkpoint is not None else {},
        tensors=[
            StoredTensor(
                name=tensor.name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                nbytes=tensor.nbytes,
                file=names[tensor.file],
            )
            for tensor in stored
        ],
    )


def targets(spec: LoadSpec, registry: Registry) -> Targets:
    """List the modules of the model, and which of them the spec's `lora` would take.

    :raises RequestError: the plan finds an error.
    """
    prepared = planning.prepare(spec, registry, download=planning.Download.NOTHING)
    prepared.plan.raise_for_errors()
    adapted = set(prepared.plan.facts.get("lora", {}).get("targets", ()))
    blank = prepared.ctx.blank
    tied = installed_transformers().tied_names(blank)
    return Targets(
        model_class=prepared.plan.model_class,
        modules=list(_grouped(blank, adapted, tied)),
    )


def _grouped(model: nn.Module, adapted: set[str], tied: set[str]) -> Iterable[Modules]:
    """Group the modules of a model without storage, in which what is ``tied`` is not tied yet."""
    groups: dict[tuple[str, str], list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            groups[pattern(name), type(module).__name__].append((name, module))
    from llmload.model import partitions

    seen: set[int] = set()
    for (group, kind), members in groups.items():
        shapes: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        elements = nbytes = 0
        for name, module in members:
            for attribute, parameter in module.named_parameters(recurse=False):
                shape = tuple(parameter.shape)
                if shape not in shapes[attribute]:
                    shapes[attribute].append(shape)
                if id(parameter) not in seen and f"{name}.{attribute}" not in tied:
                    seen.add(id(parameter))
                    elements += parameter.numel()
                    nbytes += partitions.nbytes(parameter)
        names = [name for name, _ in members]
        yield Modules(
            pattern=group,
            kind=kind,
            names=names,
            shapes=dict(shapes),
            parameters=elements,
            nbytes=nbytes,
            adapted=len(adapted.intersection(names)),
        )
