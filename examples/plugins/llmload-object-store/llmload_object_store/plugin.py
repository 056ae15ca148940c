"""The plugin ``object_store``: says where tensors lie in a store, and fetches what is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import llmload
from llmload_object_store.section import ObjectStoreSection

if TYPE_CHECKING:
    from torch import nn

    from llmload.plugin import Checkpoint
    from llmload_object_store.store import Store


class ObjectStore:
    """Has every loader take its weights from a store, each rank its own part of them."""

    name = "object_store"
    Section = ObjectStoreSection
    requires = ("fsspec>=2024.2",)
    rehearsed = False
    conflicts = (
        llmload.Conflict(
            key="weights",
            when=lambda section, weights: weights == "random",
            reason="nothing is fetched for random weights",
            fix="Remove `object_store`, or `weights: random`.",
        ),
        llmload.Conflict(
            key="weights_from",
            reason="both say where the weights are",
            fix="Keep one of them.",
        ),
    )

    @llmload.hookimpl
    def open_checkpoint(self, spec: llmload.LoadSpec, folder: Path) -> Checkpoint:
        """Fetch index and headers."""
        from llmload.plugin import Checkpoint

        files = _store(spec.sections[self.name]).shards()
        tensors = [tensor for file in files for tensor in file.safetensors()]
        return Checkpoint.described(folder, files, tensors)

    @llmload.hookimpl
    def check(self, ctx: llmload.LoadContext) -> Iterator[llmload.Note]:
        """Say where the weights come from."""
        if ctx.checkpoint is not None:
            url = ctx.section(ObjectStoreSection).url
            yield llmload.Note(text=f"fetches from {len(ctx.checkpoint.files)} object(s) of {url}")

    @llmload.hookimpl
    def audit(self, ctx: llmload.LoadContext, model: nn.Module) -> Iterator[llmload.Problem]:
        """Hold the objects to what they were when their headers were read."""
        if ctx.checkpoint is None:
            return
        section = ctx.section(ObjectStoreSection)
        changed = _store(section).changed(ctx.checkpoint.files)
        if changed:
            yield llmload.Problem(
                where="object_store.url",
                message=f"{', '.join(changed)} changed in the store while the model was loaded",
                fix="Load again when nothing writes to it.",
            )


def _store(section: ObjectStoreSection) -> Store:
    from llmload_object_store.store import Store

    return Store(section.url, section.options)
