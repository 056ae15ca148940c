"""A saved adapter held to the rules, for whoever gives one to PEFT: its counts and its patterns."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

from llmload.checkpoint.patching import replaced
from llmload.checkpoint.strict_json import short
from llmload.spec import patterns

if TYPE_CHECKING:
    from llmload.checkpoint import Checkpoint
    from llmload.checkpoint.untrusted import UntrustedFolder

ADAPTER_CONFIG: Final = "adapter_config.json"

_RANKS: Final = ("r", "rank_pattern")
_ENTRIES: Final = 4096
"""Of a list or mapping of an adapter's config; PEFT holds each against each module."""
_LAYERS: Final = 4096
"""Layers that a stack may have after replication."""


def hold_adapter(files: UntrustedFolder, content: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Raise ``CheckpointError`` where an adapter's config counts more than its weights bear.

    :param content: of ``adapter_config.json``.
    :param checkpoint: the headers of the adapter's weights.
    """
    largest = max((max(t.shape, default=0) for t in checkpoint.tensors.values()), default=0)
    for key in _RANKS:
        value = content.get(key)
        for rank in value.values() if isinstance(value, dict) else [value]:
            if isinstance(rank, int) and rank > largest:
                raise _refusal(files, key, f"{short(rank)}, and no tensor of the adapter has it")
    for key, value in content.items():
        if isinstance(value, list | dict) and len(value) > _ENTRIES:
            raise _refusal(
                files, key, f"{len(value):,} entries, more than the {_ENTRIES:,} allowed"
            )
    layers = replicated_layers(content.get("layer_replication"))
    if layers > _LAYERS:
        raise _refusal(files, "layer_replication", f"{layers:,} layers")


def replicated_layers(ranges: Any) -> int:
    """Return how many layers ``layer_replication`` makes; 0 where it is not what PEFT takes."""
    pairs = ranges if isinstance(ranges, list | tuple) else []
    return sum(
        max(0, pair[1] - pair[0])
        for pair in pairs
        if isinstance(pair, list | tuple) and len(pair) == 2 and all(type(n) is int for n in pair)
    )


def _refusal(files: UntrustedFolder, key: str, found: str) -> Exception:
    return files.refusal(
        ADAPTER_CONFIG,
        f"{key!r} asks for {found}",
        "Check that config and weights of the adapter belong together.",
    )


class _Budgeted:
    """Stands for the module ``re`` in the modules of PEFT."""

    search = staticmethod(patterns.search)
    match = staticmethod(patterns.match)
    fullmatch = staticmethod(patterns.fullmatch)

    def __getattr__(self, name: str) -> Any:
        return getattr(re, name)


@contextmanager
def matching_within_budget() -> Iterator[None]:
    """Let PEFT match names within a budget of time; what takes longer is a ``RequestError``.

    It gives regular expressions of the spec and of a saved adapter to Python's matcher, which may
    try for ever: target modules, patterns of ranks and alphas, the pattern of layers.
    """
    with ExitStack() as stack:
        for name, module in list(sys.modules.copy().items()):
            if name.startswith("peft.") and vars(module).get("re") is re:
                stack.enter_context(replaced(module, {"re": _Budgeted()}))
        yield
