"""LoRA adapters through PEFT: new, resumed, or as ColossalChat's files describe them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from llmload.builtin.lora.hooks import Hooks
from llmload.builtin.lora.section import LoraSection
from llmload.builtin.lora.without_bitsandbytes import import_peft
from llmload.hookspecs import hookimpl
from llmload.plugin import Conflict, Note, Problem, RequestError, version_of

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from llmload.builtin.lora.request import Request
    from llmload.plugin import Cost, Forecast, LoadContext

__all__ = ["LoraPlugin", "LoraSection"]

_PREFIX: Final = "base_model.model."
_UNQUANTISED: Final = ("pissa", "corda", "loftq", "mica", "lora_ga")


def _takes_their_dtype(section: LoraSection, _other: object) -> bool:
    return section.init_lora_weights == "orthogonal" and section.adapter is None


def _needs_plain_weights(section: LoraSection, _other: object) -> bool:
    start = section.init_lora_weights
    return isinstance(start, str) and start.startswith(_UNQUANTISED)


class LoraPlugin:
    """Wraps the finished base model in a ``PeftModel``."""

    name = "lora"
    stage = "adapter"
    requires = ("peft>=0.13.2",)
    provides = ("adapter",)
    Section = LoraSection
    Hooks = Hooks
    conflicts = (
        Conflict(
            ability="quantisation",
            reason="this `init_lora_weights` decomposes weights that are not quantised",
            fix="Use `init_lora_weights: true` or olora, or prepare adapter and residual model"
            " beforehand from the unquantised model.",
            when=_needs_plain_weights,
        ),
        Conflict(
            ability="quantisation",
            reason="PEFT gives the factors of `init_lora_weights: orthogonal` the dtype of the"
            " weights, which are codes there",
            fix="Use `init_lora_weights: true`, gaussian or olora.",
            when=_takes_their_dtype,
        ),
    )

    @hookimpl
    def check(self, ctx: LoadContext) -> Iterator[Problem | Note]:
        """Say which adapter will be made, and find what PEFT would refuse or get wrong."""
        import_peft()
        from llmload.builtin.lora.request import heard, merged_first, resolve

        first, request = merged_first(ctx), resolve(ctx)
        for each in (*first, request):
            if each.saved is not None:
                ctx.adapter_from = _of_model(ctx, each.saved.folder)
                ctx.to_initialise.update(_brought(ctx, each))
                yield from _resume_problems(each)
                yield from _missing_dispatchers(ctx, each)
        with heard() as warned:
            request.config()
        for text in warned:
            yield Problem(
                where="lora", severity="warning", message=f"PEFT warns: {text.rstrip('.')}"
            )
        yield from _idle(ctx, request)
        yield from _start_problems(request)
        yield from _merge_problems(ctx)
        yield from _not_merged_first(request)
        yield from _bias_problems(request)
        for each in first:
            yield Note(text=f"merge the adapter in {each.section.adapter!r} into the base first")
        for text in _notes(request):
            yield Note(text=text)
        asked = {"fields": request.fields, "changes_base": request.changes_base}
        section = ctx.section(LoraSection)
        for name, found in ctx.hooks.each("check_lora", ctx=ctx, section=section, **asked):
            yield from (each.of(name) for each in found or ())

    @hookimpl
    def wrap_adapter(self, ctx: LoadContext, model: PreTrainedModel) -> PeftModel | PreTrainedModel:
        """Put the adapter around the model, and where it is to be merged, into it."""
        from llmload.builtin.lora.install import carry_out
        from llmload.builtin.lora.request import merged_first, resolve

        asked = [*merged_first(ctx), resolve(ctx)]
        missing = [problem for each in asked for problem in _missing_dispatchers(ctx, each)]
        problems = [*missing, *_merge_problems(ctx)]
        if problems:  # said in `check` already; PEFT's words for it would come on top
            raise RequestError(problems)
        return carry_out(ctx, model)

    @hookimpl
    def cost(self, ctx: LoadContext, forecast: Forecast) -> Iterator[Cost]:
        """Say which weights of the base are written to, and what the adapter's part takes then.

        :raises RequestError: in the rehearsal another plugin has wrapped the model.
        """
        from llmload.builtin.lora.costs import costs

        if "targets" not in ctx.facts.get(self.name, {}):
            raise RequestError(
                "the finished model is without the adapter",
                fix="Another plugin wraps the model: remove its section or `lora`.",
                where="lora",
            )
        yield from costs(ctx, forecast)

    @hookimpl
    def audit(self, ctx: LoadContext, model: nn.Module) -> Iterator[Problem]:
        """Prove that the adapter is where it was put, and holds what it should."""
        from llmload.builtin.lora.proof import prove, prove_merged

        merged = ctx.section(LoraSection).merge
        yield from prove_merged(ctx, model) if merged else prove(ctx, model)


def _idle(ctx: LoadContext, request: Request) -> Iterator[Problem]:
    """Warn of an adapter that starts without effect and is never trained."""
    start = request.initialisation
    if not ctx.spec.trainable and request.saved is None and start not in (False, "orthogonal"):
        yield Problem(
            where="lora",
            severity="warning",
            message="the adapter is new and will not be trained: it changes nothing",
            fix="Remove the section; in a member that is `like` another one, write `lora: null`.",
        )


def _start_problems(request: Request) -> Iterator[Problem]:
    """Yield what initialisations need beyond the weights."""
    start = request.initialisation
    where = "lora.init_lora_weights"
    if request.saved is not None:
        return
    if start == "eva":
        yield Problem(
            where=where,
            severity="warning",
            message="'eva' starts from data: until then, the adapter starts at random",
            fix="Call peft's initialize_lora_eva_weights(result.model, batches) before training.",
        )
    elif start == "lora_ga":
        yield Problem(
            where=where,
            severity="warning",
            message="'lora_ga' starts from gradients, which a spec cannot make",
            fix="Let a plugin's post_load call peft's preprocess_loraga.",
        )
    elif start == "corda" and not _corda_files(request):
        yield Problem(
            where=where,
            message="'corda' starts from covariances of activations, and `corda_config` names no"
            " file that holds them",
            fix="Make one with peft's preprocess_corda, and name it as `covariance_file` or"
            " `cache_file` in `corda_config`.",
        )
    elif start == "loftq":
        yield from _accelerator(where)


def _corda_files(request: Request) -> bool:
    from pathlib import Path

    options: dict[str, Any] = request.fields.get("corda_config") or {}
    named = [options.get(name) for name in ("cache_file", "covariance_file")]
    return any(name is not None and Path(name).is_file() for name in named)


def _accelerator(where: str) -> Iterator[Problem]:
    import torch

    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        yield Problem(
            where=where,
            message="PEFT computes 'loftq' on a GPU, and there is none",
            fix="Use pissa or olora, or load where there is a GPU.",
        )


def _resume_problems(request: Request) -> Iterator[Problem]:
    """Refuse adapters whose base weights cannot be had again.

    Such an adapter was trained on what its initialisation left of the base; PEFT repeats the
    initialisation when it resumes, which gives the same base only where nothing is drawn or read.
    """
    start = request.initialisation
    if request.saved is None or not isinstance(start, str):
        return
    if start.startswith("pissa_niter_") or start in ("corda", "lora_ga"):
        yield Problem(
            where="lora.adapter",
            message=f"the adapter in {request.section.adapter!r} was made with {start!r}, which"
            " changed the base weights in a way that cannot be repeated",
            fix="Save it with `path_initial_model_for_weight_conversion`, which makes it a plain"
            " LoRA for the unchanged base.",
        )


def _missing_dispatchers(ctx: LoadContext, request: Request) -> Iterator[Problem]:
    """Refuse to resume layers that no plugin of this load makes."""
    present = ctx.hooks.implementing("lora_layer", wrappers=True)
    makers = request.saved.layer_plugins if request.saved is not None else {}
    for name, distribution in makers.items():
        if name not in present:
            by, fix = _where_from(name, distribution)
            yield Problem(
                where="lora.adapter",
                message=f"the adapter in {request.section.adapter!r} has layers made by the plugin"
                f" {name!r}{by}, which takes no part in this load",
                fix=fix,
            )


def _of_model(ctx: LoadContext, folder: Path) -> Path:
    """Return the folder to state in ``ctx.adapter_from``: of several, the model's own if it is one.

    The host asks what becomes of an adapter that lies there.
    """
    stated = ctx.adapter_from
    return stated if stated is not None and stated.resolve() == ctx.folder.resolve() else folder


def _brought(ctx: LoadContext, request: Request) -> dict[str, str]:
    """Return parameters of the base that a saved adapter brings whole and no checkpoint needs to
    have, such as a classifier's head -> why."""
    if request.saved is None or ctx.checkpoint is None:
        return {}
    names = {key.removeprefix(_PREFIX) for key in request.saved.checkpoint.tensors}
    known = ctx.blank.state_dict().keys()
    return dict.fromkeys(
        sorted(names & known - ctx.checkpoint.tensors.keys()),
        f"the adapter in {request.section.adapter!r} brings it",
    )


def _not_merged_first(request: Request) -> Iterator[Problem]:
    """Warn where an adapter is put on another base than it was trained on."""
    before = request.saved.merged_first if request.saved is not None else ()
    if before and not request.section.merge_first:
        yield Problem(
            where="lora.merge_first",
            severity="warning",
            message=f"the adapter in {request.section.adapter!r} was trained on its base with"
            f" {' and '.join(map(repr, before))} merged into it, and here nothing is",
            fix=f"Write `merge_first: [{', '.join(before)}]`, unless the model has it in its"
            " weights already.",
        )


def _where_from(name: str, distribution: str) -> tuple[str, str]:
    """Say of which distribution a plugin is, as a saved adapter has it, and what to do for it.

    The words of the file reach people as what to install: none but a plain name and version do.
    """
    use = f"select it with `-p {name}`; if it has a section, add `{name}: {{}}` to the spec."
    found = re.fullmatch(r"([A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?) (\d[\w.!+-]*)", distribution, re.A)
    if found is None:
        return "", f"Install the distribution that provides it and {use}"
    wanted, version = found.groups()
    here = version_of(wanted)
    if here is None:
        install = f"If you trust it, install it with `pip install '{wanted}=={version}'`"
        return f" of {distribution}", f"{install}, and {use}"
    return f" of {distribution}", f"{wanted} {here} is installed: {use}"


def _merge_problems(ctx: LoadContext) -> Iterator[Problem]:
    """Refuse to merge into weights of 8 or 4 bits: the adapter would be rounded away."""
    quantised, section = ctx.providing("quantisation"), ctx.section(LoraSection)
    if not (section.merge or section.merge_first):
        return
    parts = (ctx.config, ctx.config.get_text_config())
    stored = any(getattr(part, "quantization_config", None) is not None for part in parts)
    if quantised or (stored and not ctx.dequantised):
        yield Problem(
            where="lora.merge" if section.merge else "lora.merge_first",
            message="the base is quantised, and an adapter merged into so few bits is mostly lost",
            fix="Load the checkpoint from before it was quantised."
            if stored
            else f"Remove `{quantised[0]}`: the base is then read in full precision, and merged"
            " there.",
        )


def _bias_problems(request: Request) -> Iterator[Problem]:
    """Warn where what is trained would be lost when the adapter is saved."""
    if request.fields.get("bias") == "lora_only" and not _saves_biases_of_adapted_layers():
        yield Problem(
            where="lora.bias",
            severity="warning",
            message=f"peft {version_of('peft')} leaves the biases of adapted layers out of a saved"
            " adapter",
            fix="Use `bias: all`, or a newer peft.",
        )


def _notes(request: Request) -> Iterator[str]:
    fields, section = request.fields, request.section
    rank, alpha = fields.get("r", 8), fields.get("lora_alpha", 8)
    targets = fields.get("target_modules")
    if request.coati is not None:
        where = "the layers that ColossalChat would adapt"
    elif targets is None:
        where = "target_parameters" if fields.get("target_parameters") else "PEFT's default targets"
    else:
        where = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    scale = "sqrt(r)" if fields.get("use_rslora") else "r"
    yield f"LoRA of rank {rank}, alpha {alpha} / {scale}, on {where}"
    if request.saved is not None:
        yield f"resume the {len(request.saved.checkpoint)} tensors in {section.adapter!r}"
    if section.merge:
        yield "merge it into the weights of its base"
    if request.changes_base:
        yield f"{request.changes_base} changes the weights of the layers it adapts"
    if section.ensure_weight_tying:
        yield "tied adapters share one storage: moving or casting the model parts them"
    if request.coati is not None:
        yield from request.coati.notes(str(section.lora_config))


def _saves_biases_of_adapted_layers() -> bool:
    """Say whether PEFT saves what `bias: lora_only` trains.

    0.13.2 looks for the biases beside the adapter's factors; they are in the base layer.
    """
    from peft.tuners.tuners_utils import BaseTuner

    return hasattr(BaseTuner, "_get_adapter_state_dict")
