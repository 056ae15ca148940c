"""What loaders have in common, for plugins that load: transformers' own way, and the accounts."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

from llmload.checkpoint import Checkpoint
from llmload.errors import CheckpointError, in_one_line
from llmload.hf import installed_transformers
from llmload.loading import audit, room

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from llmload.checkpoint.accounting import Accounting
    from llmload.context.context import LoadContext


_MISFIT = ("size", "shape")
"""What transformers' error of weights that do not fit speaks of."""


def account(ctx: LoadContext, accounting: Accounting) -> None:
    """Refuse what does not fit, before a weight is read; list what is missing and unexpected."""
    if accounting.mismatched:
        raise CheckpointError(accounting.misfits())
    for name in accounting.missing:
        ctx.newly_initialised[name] = ctx.to_initialise.get(name, audit.MISSING)
    ctx.newly_initialised.update(dict.fromkeys(accounting.excused, audit.EXCUSED))
    ctx.unexpected.extend(accounting.unexpected)
    audit.hold_to_strict(ctx, ctx.newly_initialised, ctx.unexpected)


def from_pretrained(ctx: LoadContext) -> PreTrainedModel:
    """Load with transformers' ``from_pretrained`` or ``from_config``, and account for every key.

    ``ctx.load_options`` go with it. What was read of each file is recorded as ``transformers``.

    :raises CheckpointError: the checkpoint does not fit, or a plugin places the weights, for which
        only a loader that asks ``ctx.placement`` will do.
    """
    if ctx.placement is not None and not getattr(ctx.placement, "replaceable", False):
        raise CheckpointError(
            f"{type(ctx.placement).__name__} places the weights of this load, and only the"
            " streaming loader asks it, which declined",
            fix="See in the plan why it declined, or leave out the plugin that sets the placement.",
        )
    return _random(ctx) if ctx.checkpoint is None else _pretrained(ctx)


def _random(ctx: LoadContext) -> PreTrainedModel:
    model = ctx.model_class._from_config(
        ctx.config, **installed_transformers().dtype_option(ctx.dtype)
    )
    for name, _ in model.named_parameters():
        ctx.newly_initialised[name] = "weights: random"
    return model.eval()


def _pretrained(ctx: LoadContext) -> PreTrainedModel:
    from llmload.hf.counted_reads import CountedReads  # what no loader of ours needs

    checkpoint = ctx.checkpoint
    options: dict[str, Any] = {
        "config": ctx.config,
        "device_map": ctx.spec.device_map,
        **({} if ctx.spec.max_memory is None else {"max_memory": ctx.spec.most_memory}),
        "trust_remote_code": ctx.spec.trust_remote_code,
        "local_files_only": True,
        "output_loading_info": True,
        **installed_transformers().dtype_option(ctx.dtype),
        **ctx.load_options,
    }
    assert checkpoint is not None
    counts = CountedReads(checkpoint, _further_files(ctx))
    try:
        if checkpoint.as_stored and ctx.spec.weights_from is None:
            options["use_safetensors"] = checkpoint.format == "safetensors"
            with counts, installed_transformers().adapters_left_alone():
                model, info = ctx.model_class.from_pretrained(ctx.folder, **options)
        else:
            model, info = _from_tensors(ctx, checkpoint, options)
            left = {*info["unexpected_keys"]}
            counts.count_tensors(t for n, t in checkpoint.tensors.items() if n not in left)
    except CheckpointError:
        raise
    except Exception as error:
        if not counts.nbytes and not room.ran_out(error):
            by_deepspeed = _is_deepspeeds(error)
            raise CheckpointError(
                f"{'DeepSpeed' if by_deepspeed else 'transformers'} refuses the"
                f" {'load' if by_deepspeed else 'folder'} before it reads a weight:"
                f" {type(error).__name__}: {in_one_line(error).rstrip('.')}",
                fix="Mend the DeepSpeed config, which `TrainingArguments(deepspeed=...)` or"
                " `zero3.config` gives."
                if by_deepspeed
                else "Check what config.json asks for; `llmload inspect` shows it.",
                where="zero3" if by_deepspeed else "model",
            ) from error
        misfit = isinstance(error, RuntimeError) and any(w in str(error) for w in _MISFIT)
        if not misfit:
            raise
        raise CheckpointError(
            f"the checkpoint does not fit {ctx.model_class.__name__}: {error}",
            fix="Check that config.json and weights belong together.",
            where="model",
        ) from error
    ctx.record("transformers", counts.facts())
    for name in info["missing_keys"]:
        ctx.newly_initialised[name] = ctx.to_initialise.get(name, audit.MISSING)
    ctx.unexpected.extend(sorted(info["unexpected_keys"]))
    return model


def _is_deepspeeds(error: Exception) -> bool:
    """Whether DeepSpeed raised it, itself or by pydantic: not a model that it has wrapped."""
    packages = [
        str(frame.f_globals.get("__name__", "")).partition(".")[0]
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    raised_by = [package for package in packages if package not in ("pydantic", "torch")]
    return bool(raised_by) and raised_by[-1] == "deepspeed"


def _further_files(ctx: LoadContext) -> list[Path]:
    """Return the weights that transformers opens beside the model's own, all of them checked."""
    further = []
    for name in getattr(type(ctx.config), "extra_files", ()):
        if ctx.files.holds(name):
            further.append(ctx.files.path(name))
            Checkpoint.open(ctx.files.root / name)
    return further


def _from_tensors(
    ctx: LoadContext, checkpoint: Checkpoint, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Give ``from_pretrained`` the tensors under their new names, which it cannot find itself.

    It maps keys in a way of its own: 5.x replaces the first match only, 4.51.3 stops at the
    first rule that matches.
    """
    from llmload.checkpoint.mapped import MappedCheckpoint  # needs torch

    with MappedCheckpoint(checkpoint) as files:
        state = {name: files.tensor(info) for name, info in checkpoint.tensors.items()}
        model, info = ctx.model_class.from_pretrained(None, state_dict=state, **options)
        files.check()
    # Without a path it does not look for the folder's generation config.
    model.config.name_or_path = model.name_or_path = str(ctx.folder)
    installed_transformers().finish(
        model, ctx.folder, None, trust_remote_code=ctx.spec.trust_remote_code
    )
    return model, info
