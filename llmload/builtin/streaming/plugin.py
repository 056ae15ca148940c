"""The loader that is asked first: transformers' own mapping, our reading and placement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmload.builtin.streaming.section import StreamingSection
from llmload.hookspecs import hookimpl
from llmload.plugin import Decline, Note, Problem, RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from llmload.plugin import Checkpoint, LoadContext, LoadSpec, Reading

_HONOURED = {"device_map"}
_OF_TRAINER = ("trainer_state.json", "training_args.bin")


class StreamingLoader:
    """Maps the checkpoint's files and places each weight once, straight in its final form."""

    name = "streaming"
    stage = "load"
    Section = StreamingSection
    always_active = True
    provides = ("placement", "mapped_pages")

    @hookimpl
    def diagnose(self) -> Iterator[Problem | Note]:
        """Hold transformers' private functions to what is needed of them."""
        from llmload.plugin import installed_transformers

        reason = installed_transformers().unsuited()
        if reason is None:
            yield Note(text="reads each tensor once, through transformers' own mapping")
        else:
            yield Problem(
                message=f"it leaves every load to from_pretrained: {reason}",
                fix="Install a transformers that constraints/ names.",
            )

    @hookimpl
    def open_checkpoint(self, spec: LoadSpec, folder: Path, place: Path) -> Checkpoint | None:
        """Fetch headers of weights whose bytes are fetched as they are read, where that is asked.

        :raises CheckpointError: the hub cannot give them in that way.
        """
        section = spec.sections.get(self.name)
        if not isinstance(section, StreamingSection) or section.fetch == "whole":
            return None
        from llmload.plugin import checkpoint_by_ranges

        return checkpoint_by_ranges(spec, folder, place)

    @hookimpl
    def check(self, ctx: LoadContext) -> Iterator[Note | Problem | Decline]:
        """Decline what cannot be loaded exactly as ``from_pretrained`` would."""
        from llmload.plugin import Reading

        reason = _unfit(ctx)
        if reason:
            yield Decline(reason)
            if ctx.checkpoint is not None and not ctx.section(StreamingSection).mapped:
                yield Problem(
                    where="streaming.mapped",
                    message="from_pretrained loads this model, and leaves weights on the pages of"
                    f" their files: {reason}",
                    fix="Remove `mapped: false`, or copy the folder to where nobody writes.",
                )
            if _by_spans(ctx):
                yield Problem(
                    where="streaming.fetch",
                    message=f"from_pretrained loads this model, and needs whole files: {reason}",
                    fix="Leave out `fetch: spans`.",
                )
            return
        yield from _changing_pages(ctx)
        assert ctx.checkpoint is not None
        files, size = len(ctx.checkpoint.files), ctx.checkpoint.total_bytes
        reading = Reading.choose(ctx.checkpoint, ctx.section(StreamingSection).reading)
        ctx.handed_on[self.name] = reading
        if ctx.section(StreamingSection).fetch == "spans":
            yield Note(text=lambda: _fetching(ctx))
        yield Note(
            text=lambda: (
                f"read {ctx.reads or f'{size:,} bytes'} from {files} file(s), each tensor once"
                f"{_how(reading)}"
            )
        )

    @hookimpl
    def load(self, ctx: LoadContext) -> PreTrainedModel | Decline:
        """Build on the meta device, account for every key, then read and place."""
        from transformers.integrations import is_deepspeed_zero3_enabled

        from llmload.plugin import (
            MISSING,
            MappedCheckpoint,
            Plain,
            Proof,
            account,
            installed_transformers,
        )

        honoured = _HONOURED | getattr(ctx.placement, "honours", frozenset())
        if others := ctx.load_options.keys() - honoured:
            return Decline(f"a plugin set {', '.join(sorted(others))}, for from_pretrained to do")
        if is_deepspeed_zero3_enabled():
            return Decline(
                "a DeepSpeed ZeRO-3 config is active, for from_pretrained to partition by"
            )
        assert ctx.checkpoint is not None
        transformers = installed_transformers()
        placement = ctx.placement or Plain()
        model = ctx.model_to_fill()
        device_map = transformers.resolve_device_map(
            model,
            ctx.load_options.get("device_map", ctx.spec.device_map),
            ctx.spec.most_memory,
        )
        if device_map and "disk" in device_map.values():
            raise RequestError(_less_memory(ctx))
        accounting = ctx.accounting(model)
        account(ctx, accounting)
        placement.prepare(model)
        section = ctx.section(StreamingSection)
        proof = Proof(digests=section.digests)
        reading: Reading = ctx.handed_on[self.name]
        with (
            MappedCheckpoint(ctx.checkpoint, may_stay=section.may_stay, reading=reading) as files,
            proof,
        ):
            files.read_ahead(model, accounting, placement)
            missing = transformers.fill(
                model,
                files,
                placement,
                proof,
                accounting,
                dtype=ctx.dtype,
                device_map=device_map,
                name_or_path=str(ctx.folder),
            )
            facts = {"reading": reading.way, "fetched_ahead": files.finish()}
            ctx.record(self.name, facts | proof.facts(files))
        for name in missing:
            ctx.newly_initialised.setdefault(name, MISSING)
        return transformers.finish(
            model, ctx.folder, device_map, trust_remote_code=ctx.spec.trust_remote_code
        )


def _by_spans(ctx: LoadContext) -> bool:
    """Whether some of the weights are fetched byte by byte as they are read."""
    is_asked = ctx.section(StreamingSection).fetch == "spans"
    return is_asked and ctx.checkpoint is not None and bool(ctx.checkpoint.fetched)


def _fetching(ctx: LoadContext) -> str:
    """Say what comes from the hub, once what is read is known."""
    assert ctx.checkpoint is not None
    files = ctx.checkpoint.fetched
    if not files:
        return "fetch nothing: the weights are here"
    size = ctx.checkpoint.total_bytes
    named = (
        f" of {len(files)} file(s)"
        if len(files) == len(ctx.checkpoint.files)
        else (f", as far as they are in the {len(files)} file(s) that are not here")
    )
    return f"fetch {ctx.reads or f'{size:,} bytes'}{named} by ranges, what is not here yet"


def _how(reading: Reading) -> str:
    if reading.way == "mapped":
        return ""
    how = "ahead of use" if reading.way == "ahead" else "into own memory"
    return f", {how}, by {reading.threads} threads ({reading.why})"


def _less_memory(ctx: LoadContext) -> Problem:
    return Problem(
        where="device_map",
        message=f"{ctx.spec.device_map!r} leaves modules without a device: there is less memory now"
        " than when the plan was made",
        fix="Free some of it, and load again.",
    )


def _unfit(ctx: LoadContext) -> str | None:
    """Why this load is not for us, or None. Looks at config and headers only."""
    from llmload.plugin import installed_transformers, torch_dtype

    config, checkpoint = ctx.config, ctx.checkpoint
    if checkpoint is None:
        return "weights: random reads no checkpoint"
    unsuited = installed_transformers().unsuited()
    if unsuited is not None:
        return unsuited
    if getattr(config, "quantization_config", None) is not None:
        return "the checkpoint is quantised already"
    for key in ("fusion_config", "transformers_weights"):
        if getattr(config, key, None) is not None:
            return f"the config sets {key}, which only from_pretrained carries out"
    if getattr(type(config), "extra_files", ()):
        return "this model type keeps weights in further files"
    for tensor in checkpoint.tensors.values():
        if torch_dtype(tensor.dtype) is None:
            return f"{tensor.name!r} is stored as {tensor.dtype}, for which torch has no dtype"
        if tensor.name.endswith("_extra_state"):
            return f"{tensor.name!r} is a module's extra state, not a tensor of the model"
    return None


def _changing_pages(ctx: LoadContext) -> Iterator[Problem]:
    """Warn where weights will lie on pages of files that somebody is likely to write to."""
    from llmload.plugin import filesystem, torch_dtype

    assert ctx.checkpoint is not None  # else it is not for us
    stay = any(torch_dtype(info.dtype) == ctx.dtype for info in ctx.checkpoint.tensors.values())
    if not (stay and ctx.section(StreamingSection).may_stay) or ctx.placed_by is not None:
        return
    if len(ctx.checkpoint.fetched) == len(ctx.checkpoint.files):
        return
    kind = filesystem.kind(ctx.checkpoint.root)
    if filesystem.is_shared(kind):
        where = f"files on {kind}, to which other machines may write"
    elif any((ctx.checkpoint.root / name).exists() for name in _OF_TRAINER):
        where = "the folder of a Trainer's checkpoint, which is saved over"
    else:
        return
    yield Problem(
        where="streaming.mapped",
        severity="warning",
        message=f"the weights stay on the pages of {where}: the model follows a file that is"
        " overwritten in place, and the process ends where one is cut off",
        fix="Load with `streaming: {mapped: false}`, or from a local copy.",
    )
