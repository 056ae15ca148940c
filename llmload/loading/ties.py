"""Weights that the config ties and the checkpoint holds with different values: they stay apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmload.checkpoint.open_files import OpenFiles
from llmload.errors import Problem
from llmload.hf import installed_transformers

if TYPE_CHECKING:
    from llmload.checkpoint import Checkpoint, TensorInfo
    from llmload.context.context import LoadContext

_PIECE = 2**16
"""Bytes that are compared at the beginning, in the middle and at the end of two tensors."""
_WHOLE = 2**26
"""Bytes of a tensor up to which all of it is compared."""


def undone(ctx: LoadContext) -> Iterator[Problem]:
    """Untie, for plan and load alike, what is stored with different values under all its names.

    The config that is handed out then no longer says that they are tied. This is the one place
    where a plan looks at weights: nothing else tells, and it is a few pieces of two tensors.

    :raises CheckpointError: the model cannot be built.
    """
    if ctx.checkpoint is None or installed_transformers().unsuited() is not None:
        return
    if ctx.checkpoint.to_fetch:  # only headers are here; a load asks again once all is
        return
    tied = installed_transformers().ties(ctx.blank)
    if not tied:
        return
    infos = ctx.accounting(ctx.blank).as_stored
    apart = {
        name: source
        for name, source in tied.items()
        if name in infos and source in infos and _differ(ctx.checkpoint, infos[name], infos[source])
    }
    if not apart:
        return
    pairs = ", ".join(f"{name!r} to {source!r}" for name, source in sorted(apart.items()))
    message = f"the config ties {pairs}, and the checkpoint holds different values for them"
    if len(apart) < len(tied):
        # A config cannot say that one is tied and another is not, and some models scale by it.
        kept = installed_transformers().keeps_apart()
        ctx.apart.update(apart)
        yield Problem(
            where="model",
            severity="warning" if kept else "error",
            message=f"{message}, though others are tied by it"
            + (": they are not tied" if kept else ""),
            fix="Set `tie_word_embeddings` to false in config.json, or store them alike.",
        )
        return
    ctx.untie()
    yield Problem(
        where="model",
        severity="warning",
        message=f"{message}: both are kept, and the config of the loaded model says that they are"
        " not tied",
        fix="Set `tie_word_embeddings` to false in config.json.",
    )


def _differ(checkpoint: Checkpoint, one: TensorInfo, other: TensorInfo) -> bool:
    """Say whether two tensors of the checkpoint have different bytes, as far as they are read."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return one.shape == other.shape
    size = one.nbytes
    spans = [(0, _PIECE), (size // 2, _PIECE), (max(size - _PIECE, 0), _PIECE)]
    if size <= _WHOLE:
        spans.append((0, size))
    with OpenFiles(checkpoint.files) as files:
        for offset, length in spans:
            length = min(length, size - offset)
            pieces = files.pieces((info.file, info.start + offset, length) for info in (one, other))
            if pieces[0] != pieces[1]:
                return True
    return False
