"""The plugin ``npy_folder``: says where tensors lie that are stored one file each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import llmload
from llmload_npy_folder.section import NpyFolderSection

if TYPE_CHECKING:
    from llmload.plugin import Checkpoint


class NpyFolder:
    """Has every loader read a folder of ``.npy`` files as if it were safetensors."""

    name = "npy_folder"
    Section = NpyFolderSection
    requires = ("numpy",)
    rehearsed = False
    conflicts = (
        llmload.Conflict(
            key="weights",
            when=lambda section, weights: weights == "random",
            reason="no file is read for random weights",
            fix="Remove `npy_folder`, or `weights: random`.",
        ),
    )

    @llmload.hookimpl
    def open_checkpoint(self, spec: llmload.LoadSpec, place: Path) -> Checkpoint:
        """Read the headers; what lies where is all that loading needs."""
        from llmload.plugin import Checkpoint
        from llmload_npy_folder import layout

        section: NpyFolderSection = spec.sections[self.name]
        folder = place / section.folder
        files, tensors = layout.describe(folder)
        return Checkpoint.described(folder, files, tensors)

    @llmload.hookimpl
    def check(self, ctx: llmload.LoadContext) -> Iterator[llmload.Note]:
        """Say what takes the place of the usual files."""
        if ctx.checkpoint is not None:
            text = f"the weights are {len(ctx.checkpoint.files)} files in {ctx.checkpoint.root}"
            yield llmload.Note(text=text)
