"""What a load will do: made from config, tokenizer and checkpoint headers, reading no weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from llmload.checkpoint import Checkpoint
from llmload.checkpoint.untrusted import UntrustedFolder
from llmload.context.context import LoadContext
from llmload.context.machine import HERE, Machine
from llmload.errors import (
    CheckpointError,
    Decline,
    Note,
    PlanError,
    PluginError,
    Problem,
    RequestError,
)
from llmload.hf import deepspeed, installed_transformers, locating, model_classes
from llmload.hf.engine import Engine
from llmload.hf.versions import refuse_unsupported
from llmload.hookspecs import SPINE
from llmload.host import compatibility
from llmload.host.distributions import version_of
from llmload.loading import fit, forecasting, hook_calls, key_mapping, lock, room, ties
from llmload.loading.gc_pause import collection_paused
from llmload.loading.plan import Plan, Step
from llmload.loading.prepared import Prepared
from llmload.loading.rehearsal import Rehearsal, rehearse
from llmload.spec.values import dtype_name

if TYPE_CHECKING:
    from pathlib import Path

    from llmload.host.discovery import PluginInfo
    from llmload.host.registry import Host, Registry
    from llmload.spec.loadspec import LoadSpec


class Download(Enum):
    """Which files of weights a plan may fetch from the hub. Of others it fetches the headers."""

    NOTHING = "nothing"
    UNFORESEEABLE = "unforeseeable"
    """Those whose headers do not do: pickles, and all where a plugin is to admit the folder."""
    ALL = "all"


class Found(NamedTuple):
    """What a spec leads to."""

    folder: Path
    files: UntrustedFolder
    content: dict[str, Any]
    """Of ``config.json``, held to what no config may say."""
    checkpoint: Checkpoint | None
    """None where no weights are asked for."""


def prepare_to_load(spec: LoadSpec, registry: Registry) -> Prepared:
    """Make the plan of a load by headers, and where nothing stands in its way fetch what it needs.

    :raises RequestError: as :func:`prepare`.
    """
    prepared = prepare(spec, registry, download=Download.UNFORESEEABLE)
    if prepared.plan.errors or not prepared.plan.to_fetch:
        return prepared
    return prepare(spec, registry, download=Download.ALL)


@collection_paused()
def prepare(
    spec: LoadSpec, registry: Registry, *, download: Download, machine: Machine = HERE
) -> Prepared:
    """Make the plan of a load.

    :param machine: what it is made for; of a load always the one that it runs on.

    :raises RequestError: folder, config or class are wrong. Problems found later are in the plan.
    """
    require_stack()
    host = registry.activate(spec)
    folder, files, content, checkpoint = find(host, spec, download)
    config = model_classes.load_config(files, content, spec, checkpoint)
    model_class, config = model_classes.resolve_class(spec, config)
    model_classes.set_labels(spec, config)
    ctx = LoadContext(
        spec=spec,
        sections=host.sections,
        active=host.names,
        hooks=host,
        peers=host.peers,
        folder=folder,
        files=files,
        config=config,
        model_class=model_class,
        dtype=model_classes.resolve_dtype(spec, config, checkpoint),
        checkpoint=checkpoint,
        machine=machine,
        wraps_adapter=bool(host.implementing("wrap_adapter")),
        engine=Engine(installed_transformers()),
    )
    plan = Plan(
        model=str(spec.model),
        folder=str(folder),
        model_class=model_class.__name__,
        dtype=dtype_name(ctx.dtype),
        plugins={info.name: info.distribution for info in host.infos},
        problems=[*missing_requirements(host.infos), *_conflicts(host), *_broken(registry)],
    )
    if checkpoint is not None:
        plan.checkpoint_tensors = len(checkpoint.tensors)
        plan.checkpoint_bytes = checkpoint.total_bytes
        plan.to_fetch = checkpoint.to_fetch
    rehearsal = None
    if not plan.errors:
        try:
            plan.keys = key_mapping.assign(host, ctx)
            plan.problems += ties.undone(ctx)
        except RequestError as error:
            plan.problems += error.problems
    if not plan.errors:
        ctx.to_initialise.update(_new_head(ctx))
        _check(host, ctx, plan)
        try:
            plan.problems += fit.problems(ctx)
            if not plan.errors:
                plan.device_map = fit.device_map(ctx)
                plan.problems += fit.places(ctx, plan.device_map)
        except RequestError as error:
            plan.problems += error.problems
        rehearsal = rehearse(host, ctx, plan)
        if rehearsal is not None:
            plan.problems += fit.untrained(ctx, rehearsal.model)
            plan.problems += fit.ids_without_rows(ctx, rehearsal.model)
            if not plan.errors:  # plugins count on what their checks found out
                plan.problems += _undone(host, rehearsal)
            if not plan.errors:
                _foresee(host, registry, plan, rehearsal)
    prepared = Prepared(plan=plan, host=host, ctx=ctx, rehearsal=rehearsal)
    if not plan.errors:
        plan.problems += lock.problems(prepared)
    return prepared


def _undone(host: Host, rehearsal: Rehearsal) -> Iterator[Problem]:
    """Ask plugins that can tell whether the rehearsed model is what they made of it.

    What they warn of is left to the load.
    """
    for plugin in host.auditing_rehearsals():
        found = hook_calls.findings(host, plugin, "audit", ctx=rehearsal.ctx, model=rehearsal.model)
        yield from (problem for problem in found if problem.severity == "error")


def _foresee(host: Host, registry: Registry, plan: Plan, rehearsal: Rehearsal) -> None:
    """Foretell the memory that the load takes, and say what is too little."""
    try:
        forecast = forecasting.foretell(host, plan, rehearsal)
    except RequestError as error:
        plan.problems += error.problems
        return
    peaks = forecast.peaks()
    plan.memory = forecasting.told(forecast, peaks)
    plan.problems += room.problems(rehearsal.ctx, forecast, peaks, registry)


def find(host: Host, spec: LoadSpec, download: Download) -> Found:
    """Locate the model, have the plugins admit it, and read its config and headers.

    :raises RequestError: there is no such model, or a file of it is missing, damaged or unsafe.
    """
    of_model = spec.weights == "pretrained" and spec.weights_from is None
    blindly = of_model and download is not Download.NOTHING and bool(host.implementing("admit"))
    folder = locating.resolve(spec, weights=blindly)
    _admit(host, spec, folder)
    files = UntrustedFolder(folder)
    content = locating.read_config(files, spec)
    if spec.weights != "pretrained":
        return Found(folder, files, content, None)
    place = locating.weights_place(files, content, spec)
    checkpoint = _described(host, spec, folder, place)
    if checkpoint is None:
        if of_model and download is Download.ALL:
            locating.resolve(spec, weights=True)
        checkpoint = _headers(spec, folder, place, download)
    return Found(folder, files, content, checkpoint)


def _headers(spec: LoadSpec, folder: Path, place: Path, download: Download) -> Checkpoint:
    """Read the headers of the weights, from the hub where they are not here."""
    elsewhere = locating.elsewhere(spec, folder)
    pickles = [name for name in elsewhere if not name.endswith(".safetensors")]
    if pickles:
        if download is Download.NOTHING:
            raise CheckpointError(
                f"the weights of {spec.model!r} are not in the cache, and what is in"
                f" the pickle {pickles[0]!r} is known only once it is here",
                fix=f"Fetch it with `hf download {spec.model}`; a load does so.",
                where="model",
            )
        locating.resolve(spec, weights=True)
        elsewhere = {}
    return Checkpoint.open(place, allow_pickle=spec.allow_pickle, elsewhere=elsewhere)


def _new_head(ctx: LoadContext) -> dict[str, str]:
    """Return the parameters of a classifier's head that the checkpoint lacks, where the spec says
    how many labels there are to be."""
    if ctx.spec.labels is None or ctx.checkpoint is None:
        return {}
    prefix = f"{ctx.model_class.base_model_prefix}."
    return {
        name: "a new head for the labels of the spec"
        for name, _ in ctx.blank.named_parameters()
        if not name.startswith(prefix) and name not in ctx.checkpoint.tensors
    }


def _admit(host: Host, spec: LoadSpec, folder: Path) -> None:
    """Ask every plugin whether the folder may be read; raise ``PlanError`` where one refuses."""
    problems = [
        problem
        for plugin in host.implementing("admit")
        for problem in hook_calls.findings(host, plugin, "admit", spec=spec, folder=folder)
    ]
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise PlanError(errors)


def _described(host: Host, spec: LoadSpec, folder: Path, place: Path) -> Checkpoint | None:
    """Ask every plugin whether it knows where the tensors lie.

    :raises CheckpointError: two do.
    :raises PluginError: one returns something else than a checkpoint.
    """
    found: dict[str, Checkpoint] = {}
    for plugin in host.implementing("open_checkpoint"):
        answer = hook_calls.call(
            host, plugin, "open_checkpoint", spec=spec, folder=folder, place=place
        )
        if answer is None:
            continue
        if not isinstance(answer, Checkpoint):
            raise PluginError(
                f"plugin {host.describe(plugin)} returned a {type(answer).__name__} from"
                " open_checkpoint, which must return a Checkpoint or None"
            )
        found[plugin] = answer
    if len(found) > 1:
        raise CheckpointError(
            Problem(
                where="model",
                message=f"the plugins {' and '.join(map(repr, found))} each say where the weights"
                " lie",
                fix="Keep the section of one of them.",
            )
        )
    return next(iter(found.values()), None)


def require_stack() -> None:
    """Raise ``PluginError`` where nothing can be loaded.

    torch or transformers is missing, or that transformers is not supported.
    """
    found = {name: version_of(name) for name in ("torch", "transformers")}
    for name, version in found.items():
        if not version:
            raise PluginError(
                f"loading a model needs {name}, which is not installed",
                fix="Install it with `pip install 'llmload[hf]'`.",
            )
    refuse_unsupported(str(found["transformers"]))


def missing_requirements(infos: Iterable[PluginInfo]) -> Iterator[Problem]:
    """Yield what plugins declare in ``requires`` and is not installed, or not in that version."""
    for info in infos:
        for text in getattr(info.plugin, "requires", ()):
            from packaging.requirements import Requirement  # no plugin of a plain load needs it

            requirement = Requirement(text)
            found = version_of(requirement.name)
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                yield Problem(
                    where=info.name,
                    plugin=info.name,
                    message=f"the plugin needs {text}, and {found or 'none'} is installed",
                    fix=f"Install it with `pip install '{text}'`.",
                )


def _conflicts(host: Host) -> Iterable[Problem]:
    """Yield the pairs of settings that plugins declare as impossible, as far as this load has them.

    What is null in the spec is not set, but for a plugin's section, which may have its defaults.
    """
    asked = {key: value for key, value in _core_keys(host.spec).items() if value is not None}
    values = {**asked, **host.sections}
    plugins = {info.name: info.plugin for info in host.infos}
    for clash in compatibility.clashes(plugins, asked):
        if clash.holds(values):
            yield clash.problem()


def _core_keys(spec: LoadSpec) -> dict[str, Any]:
    return {
        key: getattr(spec, key) for key in spec.model_fields_set & type(spec).model_fields.keys()
    }


def _broken(registry: Registry) -> Iterable[Problem]:
    """Yield a warning for each broken plugin: this load does not name it and goes on."""
    for info in registry.broken:
        yield Problem(
            plugin=info.name,
            severity="warning",
            message=f"plugin {info.name!r} ({info.distribution}) is broken and takes no part:"
            f" {info.reason}",
            fix=f"Mend or uninstall it, or leave it out with `-p no:{info.name}`.",
        )


def _check(host: Host, ctx: LoadContext, plan: Plan) -> None:
    """Ask every plugin what it will do, then list the steps and choose the loader."""
    found: list[tuple[str, Note]] = []
    for plugin in host.implementing("check"):
        try:
            for finding in hook_calls.findings(host, plugin, "check", ctx=ctx):
                if isinstance(finding, Note):
                    found.append((finding.plugin or plugin, finding))
                elif isinstance(finding, Decline):
                    ctx.declined[finding.loader or plugin] = finding.reason
                else:
                    plan.problems.append(finding)
        except RequestError as error:
            plan.problems += error.problems
    plan.problems += _partitioned_by_others(ctx)
    plan.declined = dict(ctx.declined)
    notes: dict[str, list[str]] = {}
    for plugin, note in found:
        notes.setdefault(plugin, []).append(str(note))
    loaders = [name for name in host.implementing("load") if name not in plan.declined]
    if loaders:
        plan.loader = loaders[0]
    else:
        plan.problems.append(no_loader(plan.declined))
    spine = [
        Step(hook=hook, plugin=plugin)
        for hook in SPINE
        for plugin in ([plan.loader] if hook == "load" else host.implementing(hook))
        if plugin
    ]
    acting = {step.plugin for step in spine}
    looking = [Step(hook="check", plugin=name) for name in notes if name not in acting]
    plan.steps = looking + spine
    for step in plan.steps:
        step.notes = notes.pop(step.plugin, [])
        if step.hook == "load" and ctx.spec.ignore_adapter and fit.adapter_beside(ctx):
            step.notes.append("leave out the adapter that lies beside the weights")


def _partitioned_by_others(ctx: LoadContext) -> Iterator[Problem]:
    """Leave the model to ``from_pretrained`` where the script has set a config of ZeRO-3, and no
    plugin that takes part splits the weights."""
    if not deepspeed.partitions() or ctx.splits:
        return
    found = "a DeepSpeed config of ZeRO-3 is set, as `TrainingArguments(deepspeed=...)` does"
    if ctx.placed_by is not None:
        yield Problem(
            where="zero3",
            message=f"{found}, and the plugin {ctx.placed_by!r} places the weights without it",
            fix="Add the section `zero3: {}`, which takes that config.",
        )
    if ctx.spec.device_map is not None:
        yield Problem(
            where="device_map",
            message=f"{found}, and DeepSpeed chooses the device of each partition",
            fix="Remove `device_map`.",
        )
    asked, made = dtype_name(ctx.dtype), deepspeed.dtype()
    if made not in (None, asked):
        yield Problem(
            where="dtype",
            message=f"{found}, and makes every parameter in {made}, where the model's is {asked}",
            fix=f"Set `dtype: {made}`, or have the config train in {asked}.",
        )
    for loader in ctx.providing("placement"):
        ctx.declined.setdefault(
            loader,
            f"{found}: rank 0 reads and from_pretrained partitions; with the section `zero3: {{}}`"
            " each rank reads its own part",
        )


def no_loader(declined: Mapping[str, str]) -> Problem:
    """Return the problem that every loader declined, with the reason each gave."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in declined.items())
    return Problem(
        message=f"no loader takes this model ({reasons or 'none is selected'})",
        fix="Select the plugin `transformers`, which takes every model.",
    )
