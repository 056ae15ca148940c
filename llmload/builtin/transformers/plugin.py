"""The loader that takes every model and is asked last: transformers' own ``from_pretrained``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmload.hookspecs import hookimpl
from llmload.plugin import Note, Problem

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from llmload.plugin import LoadContext


class TransformersLoader:
    """Builds with ``from_config``, or builds and fills with ``from_pretrained``."""

    name = "transformers"
    stage = "last"

    @hookimpl
    def check(self, ctx: LoadContext) -> Iterator[Note | Problem]:
        """Say whether weights will be read or drawn."""
        if ctx.checkpoint is None:
            yield Note(text="build from the config with the model's own random initialisation")
        elif quantised_by_bitsandbytes(ctx.config) and not ctx.providing("quantisation"):
            yield Problem(
                where="kbit",
                message="the checkpoint is quantised by bitsandbytes, and the spec has no section"
                " that says how it is prepared",
                fix="Add `kbit: {}`, which takes over how it was quantised and freezes it.",
            )

    @hookimpl
    def load(self, ctx: LoadContext) -> PreTrainedModel:
        """Load as transformers does, and account for every key."""
        from llmload.plugin import from_pretrained

        return from_pretrained(ctx)


def quantised_by_bitsandbytes(config: PretrainedConfig) -> bool:
    """Say whether a config declares 8 or 4 bits by bitsandbytes; it is a mapping as read."""
    found = getattr(config, "quantization_config", None) or {}
    declared = found if isinstance(found, dict) else found.to_dict()
    return bool(declared.get("load_in_4bit") or declared.get("load_in_8bit"))
