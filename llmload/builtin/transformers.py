"""The loader that takes every model and is asked last: transformers' own ``from_pretrained``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmload import compat
from llmload.errors import CheckpointError, Problem
from llmload.findings import Note
from llmload.hookspecs import hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmload.context import LoadContext


class TransformersLoader:
    """Builds with ``from_config``, or builds and fills with ``from_pretrained``."""

    name = "transformers"
    after = ("*",)

    @hookimpl
    def check(self, ctx: LoadContext) -> Iterator[Note | Problem]:
        """Say whether weights will be read or drawn."""
        if ctx.checkpoint is None:
            yield Note(text="build from the config with the model's own random initialisation")
        elif compat.quantised_by_bitsandbytes(ctx.config) and "kbit" not in ctx.active:
            yield Problem(
                where="kbit",
                message="the checkpoint is quantised by bitsandbytes, and the spec has no section"
                " that says how it is prepared",
                fix="Add `kbit: {}`, which takes over how it was quantised and freezes it.",
            )

    @hookimpl
    def load(self, ctx: LoadContext) -> PreTrainedModel:
        """Load as transformers does, and account for every key."""
        return self._random(ctx) if ctx.checkpoint is None else self._pretrained(ctx)

    def _random(self, ctx: LoadContext) -> PreTrainedModel:
        model = ctx.model_class._from_config(ctx.config, **compat.dtype_option(ctx.dtype))
        for name, _ in model.named_parameters():
            ctx.newly_initialised[name] = "weights: random"
        return model.eval()

    def _pretrained(self, ctx: LoadContext) -> PreTrainedModel:
        options: dict[str, Any] = {
            "config": ctx.config,
            "device_map": ctx.spec.device_map,
            "key_mapping": dict(ctx.spec.key_map) or None,
            "use_safetensors": ctx.checkpoint is not None
            and ctx.checkpoint.format == "safetensors",
            "trust_remote_code": ctx.spec.trust_remote_code,
            "local_files_only": True,
            "output_loading_info": True,
            **compat.dtype_option(ctx.dtype),
            **ctx.load_options,
        }
        try:
            model, info = ctx.model_class.from_pretrained(ctx.folder, **options)
        except RuntimeError as error:
            if "size" not in str(error) and "shape" not in str(error):
                raise
            raise CheckpointError(
                Problem(
                    where="model",
                    message=f"the checkpoint does not fit {ctx.model_class.__name__}: {error}",
                    fix="Check that config.json and weights belong together.",
                )
            ) from error
        for name in info["missing_keys"]:
            ctx.newly_initialised[name] = "missing from the checkpoint"
        ctx.unexpected += sorted(info["unexpected_keys"])
        return model
