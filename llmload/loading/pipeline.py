"""Makes it happen: from a spec to a model that is proven to be what the plan said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmload.checkpoint.filesystem import FileState, file_state
from llmload.context.machine import HERE, Machine
from llmload.errors import CheckpointError, Decline, Problem
from llmload.hf import installed_transformers
from llmload.hf.constructor import Values
from llmload.hf.stamp import stamp
from llmload.host.distributions import installed_versions
from llmload.host.registry import Registry, create_registry
from llmload.loading import audit, fit, hook_calls, lock, turns, warned
from llmload.loading.gc_pause import collection_of_new_objects
from llmload.loading.makers import Ledger
from llmload.loading.plan import Plan
from llmload.loading.planning import Download, no_loader, prepare, prepare_to_load
from llmload.loading.prepared import Prepared
from llmload.loading.report import Report
from llmload.model import partitions, structure
from llmload.spec import files

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    from llmload.checkpoint import CheckpointFile
    from llmload.checkpoint.placement import Placement
    from llmload.context.context import LoadContext
    from llmload.context.records import Scope
    from llmload.context.switch import AdapterSwitch


@dataclass(frozen=True, kw_only=True, repr=False)
class LoadResult:
    """A loaded model and everything known about it."""

    model: PreTrainedModel | PeftModel
    """An ordinary ``PreTrainedModel`` or ``PeftModel``, in eval mode."""
    tokenizer: PreTrainedTokenizerBase | None
    """The tokenizer, or None for a folder without one."""
    processor: ProcessorMixin | None = None
    """For a model of more than text, what makes its inputs; ``tokenizer`` is its tokenizer."""
    plan: Plan
    """What was going to happen."""
    report: Report
    """What happened."""
    kept_alive: tuple[object, ...] = field(default=(), repr=False)
    """What plugins need to live as long as the model."""
    adapter_switch: AdapterSwitch | None = field(default=None, repr=False)
    """Turns off an adapter that is not PEFT's, where its plugin says how."""
    opened: Mapping[Path, FileState | None] = field(default_factory=dict, repr=False)
    """The files that hold the weights, as they were when the load ended."""
    awaiting: str | None = None
    """Who has yet to load the weights, where the model was handed out without them."""

    def __repr__(self) -> str:
        return f"<LoadResult: {type(self.model).__name__} from {self.report!r}>"

    def __str__(self) -> str:
        return str(self.report)

    def _repr_html_(self) -> str:
        from llmload.loading import page  # needs jinja2

        return page.of_load(self.plan, [self.report])

    def check_files(self) -> None:
        """Make sure that no file changed on whose pages weights may lie.

        For a training that wants to know before it saves what it trained, or goes on for another
        day: a model follows a file that was overwritten in place. With ``streaming: {mapped:
        false}``, and for weights that were cast, nothing can follow.

        :raises CheckpointError: with every file that was written to, cut off, replaced or removed
            since the load, be its time stamp put back or not.
        """
        changed = [path for path, state in self.opened.items() if file_state(path) != state]
        if changed:
            raise CheckpointError(
                Problem(
                    file=str(path),
                    message="the file changed since the model was loaded from it, and weights that"
                    " needed no cast may have changed with it",
                    fix="Load again, from a folder that nothing writes to.",
                )
                for path in changed
            )


def plan(
    source: files.SpecLike, *, registry: Registry | None = None, machine: Machine = HERE
) -> Plan:
    """Say what a load of the spec would do, reading no weight.

    :param source: path of a YAML or JSON file, a mapping, or a :class:`LoadSpec`.
    :param registry: the plugins to use; by default all installed ones.
    :param machine: what the load is to run on, where that is another one than this.
    :raises RequestError: the spec, the folder or a plugin it names is wrong. What else stands in
        the way is in ``plan.problems``.
    """
    registry = registry or create_registry()
    spec = registry.validate(source)
    with turns.taken(f"the plan of {spec.model!r}"):
        return prepare(spec, registry, download=Download.NOTHING, machine=machine).plan


def load(
    source: files.SpecLike, *, registry: Registry | None = None, prove: bool = True
) -> LoadResult:
    """Load the model that a spec asks for.

    :param source: path of a YAML or JSON file, a mapping, or a :class:`LoadSpec`.
    :param registry: the plugins to use; by default all installed ones.
    :param prove: run the audit. Without it the model is handed out as the plugins left it.
    :raises RequestError: the request is wrong; no weight was read.
    :raises LoadFailedError: a plugin or library failed, or the audit found the model not as planned
        (:class:`AuditError`). Nothing of the load is left behind: contexts are closed, and torch's
        default dtype, grad mode and random state are as before.

    Warnings are in ``result.report.warnings``, and go to the logger ``llmload`` as they are found.

    Loads of one process take turns, since libraries build models through global state: what other
    threads of yours do meanwhile with torch's default dtype or random stream is in
    :mod:`llmload.loading.turns`.
    """
    return load_held(source, registry=registry or create_registry(), prove=prove)


def load_held(
    source: files.SpecLike,
    *,
    registry: Registry,
    prove: bool = True,
    agree: Callable[[Prepared], None] = lambda prepared: None,
) -> LoadResult:
    """Load as :func:`load` does, if whoever asks agrees with the plan.

    :param agree: sees a plan without errors before a weight is read; what it raises ends the load.
    """
    report, begun = Report(), set[str]()
    with registry.telling(source, begun):
        spec = registry.validate(source)
        registry.announce(source)
        with turns.taken(f"the load of {spec.model!r}"):
            with report.phase("plan"):
                prepared = prepare_to_load(spec, registry)
                warned.say(prepared.plan.warnings)
                prepared.plan.raise_for_errors()
                agree(prepared)
            result = execute(prepared, report, begun, prove=prove)
            warned.say_rest(report, prepared.plan.warnings)
            return result


@collection_of_new_objects()
def execute(
    prepared: Prepared,
    report: Report,
    begun: set[str],
    *,
    prove: bool,
    placement: Placement | None = None,
    scope: Scope | None = None,
) -> LoadResult:
    """Carry out a plan without errors.

    :param begun: gets each plugin when its turn in ``init_context`` has come.
    :param placement: where the streaming loader stores weights, unless a plugin says otherwise.
    :param scope: of the group that the model is a member of, which outlasts this load.
    """
    plan, host = prepared.plan, prepared.host
    report.memory = plan.memory
    report.take_reading()
    ctx = prepared.ctx.for_run(rehearsing=False, placement=placement, scope=scope)
    ledger = Ledger(ctx)
    until_end = ctx.until_end if scope is None else nullcontext()
    with undone_on_error(), until_end, lock.held_to(prepared):
        with ExitStack() as contexts:
            for plugin in host.implementing("init_context"):
                begun.update(host.names[: host.names.index(plugin) + 1])
                with report.phase("init_context", plugin):
                    context = hook_calls.call(host, plugin, "init_context", ctx=ctx)
                    if context is not None:
                        contexts.enter_context(context)

            begun.update(host.names)
            values = Values(ctx.model_class, _constructor(ctx))
            with values.looked_after():
                model = _base_model(prepared, ctx, report)
            reached = [] if ctx.awaiting is not None else values.complete(model)
            ctx.files.check()
            if ctx.checkpoint is not None and ctx.awaiting is None:
                _part(model)
            _freeze(model, plan.frozen)
            apart = audit.kept_apart(plan, model)
            unforeseen = audit.saved_by_others(ctx, model)
            audit.list_missing(ctx, model)
            lost = dict(ctx.newly_initialised)
            ledger.take_stock(report.loader, model)
            as_loaded = structure.of(model) if prove else {}
            audit.hold_to_strict(ctx, lost, ctx.unexpected)
            if prove:
                with report.phase("audit", report.loader):
                    compared = audit.compare_with_checkpoint(ctx, model, lost)
                    computed = audit.hold_to_constructor(ctx, model, values, reached, lost)

            model, report.declined_adapters = hook_calls.finish(
                host, ctx, model, report.phase, ledger.take_stock
            )
            run = prove and _is_to_run(prepared, report.loader, structure.of(model) != as_loaded)
            model, moved = hook_calls.distribute(host, ctx, model, report.phase)
            ledger.follow(moved)
            apart = [moved.get(id(parameter), parameter) for parameter in apart]
            if prove:
                compared.follow(moved)

        audit.hold_to_claims(ctx)
        _fill(report, prepared, ctx, model, ledger)
        stamp(model, _made(plan, report))
        ctx.changed_base.update(ledger.changed_base())  # audits look at it once more
        excused = audit.excused(ctx, lost, ctx.unexpected)  # which the plan may have had
        warnings = [*plan.warnings, *excused]
        report.warnings = list(dict.fromkeys(map(str, warnings)))
        if prove:
            with report.phase("audit"):
                report.audit += audit.prove(ctx, plan, model, run=run)
                report.audit += audit.hold_to_numbers(plan, report, apart, unforeseen)
                report.compared, said = compared.handed_out(model)
                report.audit += [*computed, *said]
            for plugin in host.implementing("audit"):
                with report.phase("audit", plugin):
                    found = audit.ask(host, plugin, ctx, model)
                    report.warnings += [str(warning) for warning in found]
    return LoadResult(
        model=model,
        tokenizer=ctx.tokenizer,
        processor=ctx.processor,
        plan=plan,
        report=report,
        kept_alive=tuple(ctx.kept_alive),
        adapter_switch=ctx.adapter_switch,
        opened={file.path: file_state(file.path) for file in _files(ctx)},
        awaiting=ctx.awaiting,
    )


def _files(ctx: LoadContext) -> tuple[CheckpointFile, ...]:
    files = () if ctx.checkpoint is None else ctx.checkpoint.files
    return tuple(file for file in files if file.fetch is None)


def _base_model(prepared: Prepared, ctx: Any, report: Report) -> nn.Module:
    """Ask the loaders that did not decline in the plan, in order."""
    report.declined = dict(prepared.plan.declined)
    for plugin in prepared.host.implementing("load"):
        if plugin in report.declined:
            continue
        with report.phase("load", plugin):
            model = hook_calls.call_for_model(prepared.host, plugin, "load", ctx=ctx)
        if isinstance(model, Decline):
            report.declined[plugin] = model.reason
            continue
        report.loader = plugin
        return model
    raise CheckpointError(no_loader(report.declined))


def _constructor(ctx: Any) -> Callable[[], PreTrainedModel]:
    """Return what runs the model's constructor on the CPU, with the config as it is then."""
    construct, asked = installed_transformers().construct, ctx.spec.dtype != "auto"
    return lambda: construct(ctx.model_class, ctx.config, ctx.dtype, asked=asked)


def _is_to_run(prepared: Prepared, loader: str, changed: bool) -> bool:
    """Whether the audit runs a forward even where all or nothing is trained: of what others than
    transformers wrote or changed, or where the spec wants it.

    :param changed: whether plugins made the loaded model another one.
    """
    ctx, infos = prepared.ctx, prepared.host.infos
    others = not all(info.builtin for info in infos if info.name == loader)
    theirs = ctx.model_class.__module__.partition(".")[0] != "transformers"
    return changed or others or theirs or ctx.spec.key_exceptions.run_forward


def _part(model: nn.Module) -> None:
    from llmload.model import overlaps  # needs torch

    overlaps.part(model)


def _freeze(model: nn.Module, names: list[str]) -> None:
    frozen = set(names)
    if frozen:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in frozen:
                parameter.requires_grad_(False)


def _fill(report: Report, prepared: Prepared, ctx: Any, model: nn.Module, ledger: Ledger) -> None:
    parameters = list(model.parameters())
    folder = Path(prepared.plan.folder)
    report.model, report.folder = prepared.plan.model, str(folder)
    report.commit = folder.name if folder.parent.name == "snapshots" else ""
    report.spec = dict(files.read(ctx.spec).data)
    report.plugins = prepared.plan.plugins
    report.versions = installed_versions()
    report.parameters = sum(partitions.values(p) for p in parameters)
    report.trainable = sum(partitions.values(p) for p in parameters if p.requires_grad)
    report.parameter_bytes = sum(map(partitions.nbytes, parameters))
    report.checkpoint_bytes = prepared.plan.checkpoint_bytes
    report.newly_initialised = ledger.newly_initialised(model, report.loader)
    report.left_out = dict.fromkeys(ctx.unexpected, "no place in the model") | ctx.left_out
    if ctx.spec.ignore_adapter and fit.adapter_beside(ctx):
        report.left_out[fit.ADAPTER_CONFIG] = "the spec ignores the adapter"
    report.facts, report.lines = ctx.facts, ctx.lines


def _made(plan: Plan, report: Report) -> dict[str, Any]:
    """Return what a saved adapter says of how it was made."""
    return {
        "plugins": report.plugins,
        "steps": [step.model_dump(exclude_defaults=True) for step in plan.steps],
        "versions": report.versions,
    }


@contextmanager
def undone_on_error() -> Iterator[None]:
    """Give back torch's default dtype and grad mode always, its random state on error.

    A load that succeeds moves the random stream exactly as the libraries it calls would.
    """
    import torch

    dtype, grad, random = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state()
    linear = torch.nn.functional.linear
    try:
        yield
    except BaseException:
        torch.set_rng_state(random)
        # DeepSpeed replaces it, for the rest of the process, by one that keeps gathered weights out
        # of the autograd graph.
        torch.nn.functional.linear = linear
        raise
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
