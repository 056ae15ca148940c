"""Gradient checkpointing, with the input gradients without which an adapter would learn nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmload.builtin.gradient_checkpointing.section import GradientCheckpointingSection
from llmload.hookspecs import hookimpl
from llmload.plugin import Conflict, Note, Problem, RequestError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from llmload.plugin import LoadContext


class GradientCheckpointingPlugin:
    """Turns checkpointing on through transformers, and the forward's cache off.

    A checkpointed layer passes gradients on only if its input requires them. With a frozen base the
    embeddings' output does not, so it is made to wherever an adapter follows or torch's reentrant
    variant is used.
    """

    name = "gradient_checkpointing"
    stage = "training"
    Section = GradientCheckpointingSection
    provides = ("gradient_checkpointing",)
    audits_rehearsal = True
    conflicts = (
        Conflict(
            key="trainable",
            when=lambda section, trainable: trainable is False,
            reason="a model that is not trained has no backward pass to save memory in",
            fix="Remove the section; in a member that is `like` another one, write"
            " `gradient_checkpointing: null`.",
        ),
    )

    @hookimpl
    def diagnose(self) -> Iterator[Problem]:
        """Say where transformers is too old for a part of the section."""
        from llmload.plugin import installed_transformers

        if not installed_transformers().checkpoints_selectively():
            yield Problem(
                severity="warning",
                message="the installed transformers does not know `every_n_layers` and `offload`",
                fix="For these, install transformers 5.23 or newer.",
            )

    @hookimpl
    def check(self, ctx: LoadContext) -> Iterator[Note | Problem]:
        """Say whether the architecture and transformers can do what is asked."""
        from llmload.plugin import installed_transformers

        section = ctx.section(GradientCheckpointingSection)
        if not installed_transformers().checkpoints_gradients(ctx.model_class):
            yield _unsupported(ctx.model_class)
        for key in ("every_n_layers", "offload"):
            if (
                key in section.model_fields_set
                and not installed_transformers().checkpoints_selectively()
            ):
                yield Problem(
                    where=f"gradient_checkpointing.{key}",
                    message=f"the installed transformers does not know {key!r}",
                    fix="Remove the key, or install transformers 5.23 or newer.",
                )
        if section.offload and not _has_accelerator():
            yield Problem(
                where="gradient_checkpointing.offload",
                message="there is no accelerator here from which to move activations to the host",
                fix="Remove the key.",
            )
        text = "reentrant" if section.use_reentrant else "non-reentrant"
        if section.every_n_layers > 1:
            text += f", one layer in {section.every_n_layers}"
        if _needs_input_gradients(ctx):
            text += ", with input gradients"
        yield Note(text=text)

    @hookimpl
    def post_load(self, ctx: LoadContext, model: PreTrainedModel) -> PreTrainedModel:
        """Turn it on, and the cache off."""
        from llmload.plugin import installed_transformers

        section = ctx.section(GradientCheckpointingSection)
        try:
            installed_transformers().enable_checkpointing(
                model,
                section.torch_options(),
                every_n_layers=section.every_n_layers,
                offload=section.offload,
            )
        except ValueError:  # none of its modules has the switch, whatever its class says
            raise RequestError(_unsupported(type(model))) from None
        for config in (model.config, model.config.get_text_config()):
            if hasattr(config, "use_cache"):
                config.use_cache = False
        # transformers 5 does so itself for text models; a second hook could not be removed.
        if _needs_input_gradients(ctx) and not _has_input_hook(model):
            installed_transformers().require_input_gradients(model)
        ctx.record(
            self.name,
            {"modules": len(_checkpointed(model)), "input_gradients": _has_input_hook(model)},
        )
        return model

    @hookimpl
    def audit(self, ctx: LoadContext, model: nn.Module) -> Iterator[Problem]:
        """Prove that it is on as asked, and that gradients pass through what is checkpointed."""
        fix = "A plugin after `gradient_checkpointing` changed it; report this to its makers."
        asked = ctx.section(GradientCheckpointingSection).torch_options()
        planned = ctx.facts[self.name]["modules"]
        checkpointed = _checkpointed(model)
        options = [module._gradient_checkpointing_func.keywords for module in checkpointed.values()]
        if len(options) != planned or any(found != asked for found in options):
            yield Problem(
                message=f"{planned} modules were to checkpoint with {asked}, {options.count(asked)}"
                " of them do",
                fix=fix,
            )
        if ctx.rehearsing:
            return  # the load runs a forward
        inside = tuple(f"{name}." if name else "" for name in checkpointed)
        within = {
            n for n, p in model.named_parameters() if p.requires_grad and n.startswith(inside)
        }
        result = ctx.probe(model)
        if result.method != "unavailable" and within and within <= set(result.unreached):
            yield Problem(
                message=f"no gradient reaches the {len(within)} trainable parameters in the"
                " checkpointed layers",
                fix=fix,
            )


def _needs_input_gradients(ctx: LoadContext) -> bool:
    return ctx.wraps_adapter or ctx.section(GradientCheckpointingSection).use_reentrant


def _unsupported(model_class: type) -> Problem:
    return Problem(
        where="gradient_checkpointing",
        message=f"{model_class.__name__} does not support gradient checkpointing",
        fix="Remove the section `gradient_checkpointing`.",
    )


def _has_input_hook(model: nn.Module) -> bool:
    return getattr(model, "_require_grads_hook", None) is not None


def _checkpointed(model: nn.Module) -> dict[str, Any]:
    """Return the modules that recompute what is in them, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "gradient_checkpointing", False)
        and hasattr(module, "_gradient_checkpointing_func")
    }


def _has_accelerator() -> bool:
    """Say whether torch has an accelerator here. ``torch.accelerator`` came with torch 2.6."""
    import torch

    return (
        torch.accelerator.is_available()
        if hasattr(torch, "accelerator")
        else torch.cuda.is_available()
    )
