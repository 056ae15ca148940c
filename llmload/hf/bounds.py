"""What a config asks for, held to what the checkpoint's headers can bear, before it is built.

A config of a hundred bytes can ask for a million layers or a billion labels. None of that costs the
folder a byte; all of it costs whoever builds the model, and some of it whoever reads the config:
transformers makes a name for each label and a type for each layer.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

from llmload.checkpoint.strict_json import short
from llmload.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from torch import nn

    from llmload.checkpoint import Checkpoint
    from llmload.checkpoint.untrusted import UntrustedFolder

# Keys that count what a model is made of, each of which transformers makes one by one.
_COUNTS: Final = re.compile(
    r"(layers?|blocks?|depths?|stages?|experts|experts_per_tok|groups|labels|levels|codebooks)$"
)
_FEW: Final = 4096
"""As many may be asked for whatever the headers say: a shared layer is stored once."""
_LABELS: Final = 32_768
"""As many labels: each is a row of the head, which may be new."""
_KEYS: Final = 20_000
"""Keys of one object, each of which transformers makes an attribute and copies often."""
_SHOWN: Final = 5
_PARTS_PER_TENSOR: Final = 4
"""Parameters for each tensor of the checkpoint: fused ones are stored as one, quantised as more."""
_PARAMETERS: Final = 20_000
"""Parameters that a model may have beside those, or without a checkpoint at all ten times that."""
_BUFFER_BYTES: Final = 2**30
"""Bytes of buffers that no checkpoint holds: masks and tables of positions."""
_FIX: Final = "Check that config.json and weights belong together."


def hold_counts(
    files: UntrustedFolder, content: dict[str, Any], checkpoint: Checkpoint | None
) -> None:
    """Raise ``CheckpointError`` where the config counts more layers or labels than there can be."""
    stored = [] if checkpoint is None else checkpoint.tensors.values()
    tensors = len(stored)
    rows = max((tensor.shape[0] for tensor in stored if tensor.shape), default=0)
    limits = {"labels": max(_LABELS, rows)}
    problems = [
        Problem(
            file=str(files.root / "config.json"),
            where=path,
            message=f"the config asks for {short(count)}, and the {tensors:,} tensors of the"
            f" checkpoint bear {limit:,} at most",
            fix=_FIX,
        )
        for path, key, count in _counts(content)
        if count > (limit := limits.get(key, max(_FEW, _PARTS_PER_TENSOR * tensors)))
    ]
    problems += [
        Problem(
            file=str(files.root / "config.json"),
            where=path,
            message=f"the config has {count:,} keys here, more than the {_KEYS:,} allowed",
            fix="Save or download the folder again.",
        )
        for path, count in _wide(content)
    ]
    if problems:
        raise CheckpointError(problems[:_SHOWN])


def _wide(node: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """Yield path and size of the objects with more keys than anything has but a list of labels."""
    if len(node) > _KEYS:
        yield path, len(node)
    for key, value in node.items():
        if isinstance(value, dict) and key not in ("id2label", "label2id"):
            yield from _wide(value, f"{path}.{key}" if path else key)


def _counts(node: Any, path: str = "") -> Iterator[tuple[str, str, int]]:
    """Yield path, kind and value of each number that counts parts of a model."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict):
            yield from _counts(value, here)
        elif isinstance(key, str) and (match := _COUNTS.search(key)):
            for count in value if isinstance(value, list) else [value]:
                if isinstance(count, int | float):
                    yield here, match[1], count  # type: ignore[misc]
        elif isinstance(value, list):
            yield from _counts([v for v in value if isinstance(v, dict | list)], here)


@contextmanager
def while_building(tensors: int) -> Iterator[None]:
    """Stop this thread from building a model of far more parts than the checkpoint has tensors.

    :param tensors: number of tensors in the checkpoint; 0 without one.
    """
    from torch.nn.modules import module

    limit = _PARTS_PER_TENSOR * tensors + _PARAMETERS * (1 if tensors else 10)
    thread, count = threading.get_ident(), 0

    def counted(*registered: object) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            if count > limit:
                raise ValueError(
                    f"it asks for more than {limit:,} parameters and modules, and the checkpoint"
                    f" has {tensors:,} tensors"
                )

    with ExitStack() as hooks:
        for register in (
            module.register_module_parameter_registration_hook,
            module.register_module_module_registration_hook,
            module.register_module_buffer_registration_hook,
        ):
            hooks.callback(register(counted).remove)
        yield


def hold_built(model: nn.Module, tensors: int) -> None:
    """Raise ``ValueError`` where loading a model that has no memory yet would take far too much.

    :param tensors: number of tensors in the checkpoint; 0 if every weight will be drawn.
    """
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    if buffers > _BUFFER_BYTES:  # few models come near: only then is it asked which ones are saved
        held = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
        buffers = sum(buffer.nbytes for buffer in model.buffers() if id(buffer) not in held)
    if buffers > _BUFFER_BYTES:
        raise ValueError(
            f"it asks for buffers of {buffers:,} bytes that no checkpoint holds, more than the"
            f" {_BUFFER_BYTES:,} allowed"
        )
    drawn = 0 if tensors else sum(parameter.nbytes for parameter in model.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if drawn > memory:
        raise ValueError(
            f"it asks for {drawn:,} bytes of random weights, and this machine has {memory:,} bytes"
            " of memory"
        )
