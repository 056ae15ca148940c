"""What must be the same on all ranks before the first of them partitions anything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from llmload.checkpoint.digests import of_samples, of_weights
from llmload.host.distributions import installed_versions

if TYPE_CHECKING:
    from llmload.context.context import LoadContext

_PER_HOST = {"model", "revision", "cache_dir", "local_files_only"}
"""Keys of a spec that may differ: they say where the files are, which are compared themselves."""

_SHOWN = 60


def request_of(
    ctx: LoadContext, *, apart: str, details: Mapping[str, Any], digests: bool = False
) -> dict[str, str]:
    """Return what this rank is about to load, by names that a message can show.

    Small values stand for themselves, others as a digest. Of the weights a sample of every tensor
    is compared: headers alone would take a base model for what was tuned from it.

    :param apart: the section that may differ, whose content ``details`` compare.
    :param details: what else must be the same, by names for a message.
    :param digests: compare all bytes of the weights, which reads them once more.
    """
    asked = {
        key: _plain(value)
        for key, value in {**ctx.spec.model_dump(), **ctx.sections}.items()
        if key not in _PER_HOST and key != apart
    }
    vocabulary = None if ctx.tokenizer is None else len(ctx.tokenizer)
    return {
        **{f"`{key}`": _short(value) for key, value in asked.items()},
        **{f"plugin {name!r}": peer.distribution for name, peer in ctx.peers.items()},
        **{f"the version of {name}": found for name, found in installed_versions().items()},
        # Their collectives must meet in one order.
        "the order of plugins": ", ".join(ctx.active),
        **{name: _short(value) for name, value in details.items()},
        "the model's config": _short(_of_model(ctx)),
        "the checkpoint": _short(_of_checkpoint(ctx)),
        **_contents(ctx, digests=digests),
        "the size of the vocabulary": str(vocabulary),
        "the model's dtype": str(ctx.dtype),
    }


def _contents(ctx: LoadContext, *, digests: bool) -> dict[str, str]:
    """Return what tells weights of equal headers apart."""
    if ctx.checkpoint is None:
        return {}
    if not digests:
        return {"a sample of the weights": _short(of_samples(ctx.checkpoint))}
    return {
        f"the content of {file.name}": file.version or of_weights(file)
        for file in ctx.checkpoint.files
    }


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _of_model(ctx: LoadContext) -> dict[str, Any]:
    content = ctx.config.to_dict()
    # Where the folder lies may differ from host to host.
    return {key: value for key, value in content.items() if key != "_name_or_path"}


def _of_checkpoint(ctx: LoadContext) -> list[Any]:
    """Everything that decides which bytes are read: names, dtypes, shapes and places."""
    if ctx.checkpoint is None:
        return []
    names = {file.path: file.name for file in ctx.checkpoint.files}
    return [
        [info.name, info.dtype, list(info.shape), names[info.file], info.start]
        for info in ctx.checkpoint.tensors.values()
    ]


def _short(value: Any) -> str:
    # Sorted, and dtypes by their text: equal values must give equal text in every process.
    text = json.dumps(value, sort_keys=True, default=str)
    if len(text) <= _SHOWN:
        return text
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
