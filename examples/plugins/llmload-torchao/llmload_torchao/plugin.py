"""The plugin ``torchao``: weights in 8 bits, quantised while they are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import llmload
from llmload.plugin import partitions, size_text, some
from llmload_torchao.section import TorchaoSection

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class TorchaoPlugin:
    """Quantises while loading, freezes the base, and proves rows of each weight."""

    name = "torchao"
    Section = TorchaoSection
    stage = "quantisation"
    requires = ("torchao>=0.18", "transformers>=5.3")
    provides = ("quantisation",)
    conflicts = (
        llmload.Conflict(
            key="weights",
            when=lambda section, weights: weights == "random",
            reason="random weights are not read, so nothing can be quantised on the way",
            fix="Remove `torchao`, or load a checkpoint.",
        ),
    )

    @llmload.hookimpl
    def check(self, ctx: llmload.LoadContext) -> Iterator[llmload.Note | llmload.Problem]:
        """Say what will be done, and what nobody can do with such weights."""
        if _is_quantised(ctx):
            yield llmload.Problem(
                where="torchao",
                message="the checkpoint is quantised already",
                fix="Remove `torchao`, or load the checkpoint from before.",
            )
        if ctx.splits:
            yield llmload.Problem(
                where="torchao",
                message=f"the plugin {ctx.placed_by!r} leaves each rank a part of one flat tensor"
                " for each weight, and torchao stores a weight in several",
                fix=f"Remove `torchao` or `{ctx.placed_by}`; `kbit` can be split.",
            )
        ctx.placed_by = self.name
        weights = ctx.section(TorchaoSection).weights
        yield llmload.Note(text=f"quantise linear layers to {weights}, a scale for each row")
        yield llmload.Note(text="freeze the base model")

    @llmload.hookimpl
    def check_lora(self, changes_base: str) -> Iterator[llmload.Problem]:
        """Refuse adapters that start from other base weights than the checkpoint's."""
        if changes_base:
            yield llmload.Problem(
                where="lora.init_lora_weights",
                message=f"{changes_base} changes the weights that the adapter starts from, and"
                " those are in 8 bits",
                fix="Remove `init_lora_weights`, or `torchao`.",
            )

    @llmload.hookimpl
    def init_context(self, ctx: llmload.LoadContext) -> None:
        """Tell both loaders what to quantise."""
        from llmload_torchao.placement import TorchaoPlacement, configuration

        config = configuration(ctx.section(TorchaoSection), ctx.blank)
        ctx.load_options["quantization_config"] = config
        ctx.placement = TorchaoPlacement(config)

    @llmload.hookimpl
    def post_load(self, ctx: llmload.LoadContext, model: PreTrainedModel) -> PreTrainedModel:
        """Freeze the model, and record what its weights take."""
        from llmload_torchao.placement import configuration, quantised, rehearse

        if ctx.rehearsing:
            rehearse(configuration(ctx.section(TorchaoSection), ctx.blank), model)
        model.requires_grad_(False)
        found = quantised(model)
        _refuse_unquantised(ctx, model, found)
        facts = {
            "layers": len(found),
            "parameters": sum(map(partitions.elements, found.values())),
            "bytes": sum(map(partitions.nbytes, found.values())),
            "unquantised_bytes": sum(
                partitions.nbytes(p) for n, p in model.named_parameters() if n not in found
            ),
        }
        ctx.record(self.name, facts)
        if ctx.rehearsing:
            taken, left = size_text(facts["bytes"]), size_text(facts["unquantised_bytes"])
            ctx.show(self.name, "torchao", f"{facts['parameters']:,} values in {taken}, scales too")
            ctx.show(self.name, "torchao", f"all others in {left}")
        ctx.handed_on[self.name] = found
        return model

    @llmload.hookimpl
    def audit(self, ctx: llmload.LoadContext, model: nn.Module) -> Iterator[llmload.Problem]:
        """Quantise rows of each weight once more, from the file, and account for every one."""
        found: dict[str, Any] = ctx.handed_on[self.name]
        there = {id(parameter) for parameter in model.parameters()}
        gone = [name for name, parameter in found.items() if id(parameter) not in there]
        if gone:
            yield _problem(f"{some(gone)} are not in the model any more", "Report this.")
        came: dict[str, list[str]] = {"proven": [], "converted": [], "wrong": []}
        for name, what in _differing(ctx, found):
            came[what].append(name)
        ctx.record(self.name, {"proven": len(came["proven"]), "converted": came["converted"]})
        if came["wrong"]:
            yield _problem(
                f"{some(came['wrong'])} are not what the checkpoint's values give when quantised",
                "Try another loader with `-p no:NAME`, and report this.",
            )


def _is_quantised(ctx: llmload.LoadContext) -> bool:
    return getattr(ctx.config, "quantization_config", None) is not None


def _refuse_unquantised(
    ctx: llmload.LoadContext, model: nn.Module, found: dict[str, nn.Parameter]
) -> None:
    if not found:
        raise llmload.RequestError(
            llmload.Problem(
                where="torchao",
                message=f"{type(model).__name__} has no linear layer to quantise",
                fix="Remove `torchao`, or list fewer `skip_modules`.",
            )
        )
    missing = _without_values(ctx, found)
    if missing:
        raise llmload.RequestError(
            llmload.Problem(
                where="torchao",
                message=f"the checkpoint has no values for {some(missing)}, and only what is read"
                " is quantised",
                fix="List the modules in `torchao: {skip_modules: [...]}`.",
            )
        )


def _without_values(ctx: llmload.LoadContext, found: dict[str, nn.Parameter]) -> list[str]:
    """Return the weights to be quantised that the checkpoint lacks, and ``strict`` lets pass."""
    if ctx.accounted is None or _is_quantised(ctx):  # which the plan refuses
        return []
    return sorted(found.keys() & {*ctx.accounted.missing, *ctx.accounted.excused})


def _differing(ctx: llmload.LoadContext, found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name of each weight, and what came of holding it to the file."""
    from llmload.plugin import MappedCheckpoint
    from llmload_torchao.placement import agrees

    assert ctx.checkpoint is not None  # the conflict with `weights: random` saw to it
    infos = dict(ctx.checkpoint.tensors)
    if ctx.accounted is not None:
        infos |= ctx.accounted.as_stored
    with MappedCheckpoint(ctx.checkpoint) as files:
        for name, parameter in found.items():
            info = infos.get(name)
            if info is None or info.shape != tuple(parameter.shape):
                yield name, "converted"  # of several tensors, by transformers
            elif agrees(files.tensor(info), parameter, ctx.dtype):
                yield name, "proven"
            else:
                yield name, "wrong"


def _problem(message: str, fix: str) -> llmload.Problem:
    return llmload.Problem(where="torchao", message=message, fix=fix)
