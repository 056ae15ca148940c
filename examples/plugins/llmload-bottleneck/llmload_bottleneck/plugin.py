"""The plugin ``bottleneck``: an adapter system of its own on a frozen base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import llmload
from llmload.plugin import alike, closest, partitions, some
from llmload_bottleneck.section import BottleneckSection

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from llmload_bottleneck.files import Saved
    from llmload_bottleneck.section import Shape


class BottleneckPlugin:
    """Freezes the model and puts narrow trainable layers behind some of its modules."""

    name = "bottleneck"
    Section = BottleneckSection
    stage = "adapter"
    provides = ("adapter",)

    @llmload.hookimpl
    def check(self, ctx: llmload.LoadContext) -> Iterator[llmload.Note | llmload.Problem]:
        """Open a saved adapter, and say what will be put where."""
        section = ctx.section(BottleneckSection)
        shape: Shape = section
        if section.adapter is not None:
            from llmload_bottleneck.files import open_saved

            saved = open_saved(section.adapter)
            ctx.files.adopt("adapter", saved.files)
            ctx.handed_on[self.name] = saved
            shape = saved.shape
            yield llmload.Note(text=f"resume the adapter in {section.adapter!r}")
        targets = ", ".join(shape.target_modules)
        yield llmload.Note(
            text=f"bottlenecks of size {shape.size} with {shape.activation} behind {targets}"
        )

    @llmload.hookimpl
    def wrap_adapter(self, ctx: llmload.LoadContext, model: PreTrainedModel) -> PreTrainedModel:
        """Freeze the model and attach the adapter, in the rehearsal without storage."""
        from llmload_bottleneck.layers import Switch, weights

        saved: Saved | None = ctx.handed_on.get(self.name)
        shape = ctx.section(BottleneckSection) if saved is None else saved.shape
        model.requires_grad_(False)
        layers = _attach(ctx, model, shape)
        source = "an adapter that starts without effect"
        if saved is not None:
            source = f"resumed from {str(saved.folder)!r}"
            _fill(ctx, model, saved)
        ctx.newly_initialised.update(dict.fromkeys(weights(model), source))
        ctx.adapter_switch = Switch(model)
        ctx.record(self.name, {"targets": layers})
        if ctx.rehearsing:
            for line in alike(layers):
                ctx.show(self.name, "bottlenecks behind", line)
        return model

    @llmload.hookimpl
    def audit(self, ctx: llmload.LoadContext, model: nn.Module) -> Iterator[llmload.Problem]:
        """Prove that each bottleneck is in the forward and holds what it is to start with."""
        from llmload_bottleneck.layers import CHILD, adapt

        idle = [
            name
            for name in ctx.facts[self.name]["targets"]
            if adapt not in model.get_submodule(name)._forward_hooks.values()
            or CHILD not in model.get_submodule(name)._modules
        ]
        if idle:
            yield _problem(f"{some(idle)} lost the adapter", "A plugin that runs later removed it.")
        wrong = list(_differing(model, ctx.handed_on.get(self.name)))
        if wrong:
            yield _problem(
                f"{some(wrong)} do not hold what the adapter starts with",
                "A plugin that runs later changed them; report this to its makers.",
            )


def _attach(ctx: llmload.LoadContext, model: PreTrainedModel, shape: Shape) -> list[str]:
    """Attach new bottlenecks, partitioned as the model is; return the modules they stand behind."""
    from llmload.plugin import probe  # imports torch
    from llmload_bottleneck import layers

    targets = _targets(model, shape)
    ran = probe(model, watch=targets)
    if missing := [name for name in targets if name not in ran.outputs]:
        raise llmload.RequestError(
            llmload.Problem(
                where="bottleneck.target_modules",
                message=f"how wide the output of {some(missing)} is cannot be told: "
                + (ran.reason if ran.method == "unavailable" else "no forward calls it"),
                fix="Name modules that a forward calls, such as each layer's mlp.",
            )
        )
    for name in targets:
        module = model.get_submodule(name)
        device = next((p.device for p in module.parameters()), model.device)
        made = layers.Bottleneck(ran.outputs[name][-1], shape, dtype=ctx.dtype, device=device)
        made.train(module.training)
        partitions.split(made, like=model)
        layers.attach(module, made)
    return targets


def _targets(model: nn.Module, shape: Shape) -> list[str]:
    """Return the names of the modules that the adapter's targets mean.

    :raises RequestError: one of them means none.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, None] = {}
    problems = []
    for target in shape.target_modules:
        meant = [name for name in names if f".{name}".endswith(f".{target}")]
        found.update(dict.fromkeys(meant))
        if not meant:
            ends = {name.rpartition(".")[2] for name in names}
            near = closest(target, ends) or sorted(end for end in ends if not end.isdigit())
            problems.append(
                llmload.Problem(
                    where="bottleneck.target_modules",
                    message=f"no module of {type(model).__name__} is called {target!r}",
                    fix=f"Names are {', '.join(near)}.",
                )
            )
    if problems:
        raise llmload.RequestError(problems)
    return list(found)


def _fill(ctx: llmload.LoadContext, model: nn.Module, saved: Saved) -> None:
    """Copy a saved adapter into its layers; in the rehearsal only names and shapes are looked at.

    :raises RequestError: it is not the adapter of such a model.
    """
    from llmload_bottleneck.layers import weights

    state = saved.outline() if ctx.rehearsing else saved.state()
    missing, unexpected = partitions.load_state_dict(model, state, strict=False)
    lost = sorted(weights(model).keys() & set(missing))
    folder = str(saved.folder)
    if lost:
        raise llmload.RequestError(
            _problem(f"the adapter in {folder!r} lacks {some(lost)}", "Save it again, complete.")
        )
    # A name that the base has is no more the adapter's than one that nobody has.
    others = sorted({*unexpected, *(state.keys() - weights(model).keys())})
    if others:
        raise llmload.RequestError(
            _problem(
                f"the adapter in {folder!r} holds {some(others)}, which are not an adapter's",
                "Check that model and adapter belong together.",
            )
        )


def _differing(model: nn.Module, saved: Saved | None) -> Iterator[str]:
    """Yield parameters, of which this rank may hold a part, that do not hold what they should."""
    import torch

    from llmload_bottleneck.layers import weights

    state = None if saved is None else saved.state()
    for name, parameter in weights(model).items():
        held = partitions.held(parameter)
        if held is None or held[0].numel() == 0:
            continue  # on a disk, or padding alone
        values, start = held
        if state is not None:
            wanted = state[name].reshape(-1)[start : start + len(values)].to(values.dtype)
            # As bytes, so that NaN equals NaN.
            if not torch.equal(wanted.view(torch.uint8), values.cpu().view(torch.uint8)):
                yield name
        elif ".up." in name and values.any():
            yield name


def _problem(message: str, fix: str) -> llmload.Problem:
    return llmload.Problem(where="bottleneck.adapter", message=message, fix=fix)
