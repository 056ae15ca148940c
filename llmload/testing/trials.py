"""What the conformance suite does in processes of its own: a plugin planned, loaded, failed.

Each function is one trial. It returns what it found as (rule, message, fix), and what the next
trial needs.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import inspect
import io
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llmload
from llmload.errors import LlmloadError, RequestError
from llmload.leaving import LeavingWarning
from llmload.plugin import in_one_line
from llmload.testing import examples, ranks

Found = tuple[str, str, str]
"""Rule, message and fix of one finding."""


@dataclass(frozen=True)
class Case:
    """A plugin, and a spec in which it takes part."""

    plugin: Any
    spec: dict[str, Any]
    leaves: tuple[str, ...]
    """Keys of a snapshot that it changes on purpose."""
    bad: tuple[dict[str, Any], ...]
    """Sections that its author says must be refused."""

    @property
    def made(self) -> Any:
        """The plugin as an object."""
        return self.plugin() if inspect.isclass(self.plugin) else self.plugin

    @property
    def name(self) -> str:
        """The plugin's name."""
        return str(self.plugin.name)

    def registry(self, *others: object) -> llmload.Registry:
        """Make a registry with the plugin beside those that are installed."""
        return llmload.create_registry([self.plugin, *others], environ={})

    def without(self) -> dict[str, Any]:
        """Return the spec without the plugin's section."""
        return {key: value for key, value in self.spec.items() if key != self.name}


def make_folder(place: Path, timeout: float) -> Path:
    """Make a tiny Llama with a tokenizer, in a process that has torch already."""
    folder = place / "llama"
    (made,) = ranks.outcomes(_make, (folder,), ranks=1, timeout=timeout, process_group=False)
    if made.error:
        raise RuntimeError(f"no tiny model could be made:\n{made.error}")
    return folder


def _make(folder: Path) -> None:
    from llmload.testing.checkpoints import tiny_checkpoint

    tiny_checkpoint(folder, pad=True)


# --- one load ---------------------------------------------------------------------------------


def once(case: Case) -> tuple[list[Found], list[str] | None]:
    """Plan and load twice, and hold one against the other.

    Also returns the modules that are imported by now, or None where the plugin does not load.
    """
    listener = _Listener(type(case.made).__module__)
    with redirect_stdout(listener), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", LeavingWarning)
        found = list(_once(case))
    goes = [str(one.message) for one in told if _is_of(one, type(case.made).__module__)]
    found += [("lasting", *of_leaving(text)) for text in dict.fromkeys(goes)]
    for line in listener.heard[:1]:
        fix = "Use logging, or a Note of the plan."
        found.append(("silence", f"it writes {line!r} to standard output", fix))
    fails = any(rule == "example" or "does not load" in message for rule, message, _ in found)
    return found, None if fails else sorted(sys.modules)


def _is_of(warning: warnings.WarningMessage, module: str) -> bool:
    """Say whether it is of something that goes, used by a plugin's own code."""
    package = sys.modules.get(module.partition(".")[0])
    place = Path(getattr(package, "__file__", None) or "")
    own = place.parent if hasattr(package, "__path__") else place
    return warning.category is LeavingWarning and Path(warning.filename).is_relative_to(own)


def of_leaving(text: str) -> tuple[str, str]:
    """Return message and fix for what a warning says: what goes, and what to do instead."""
    goes, _, instead = text.partition(". ")
    return f"it uses what goes: {goes}", instead


class _Listener(io.StringIO):
    """Stands for standard output, and keeps what a plugin's own code writes to it.

    What libraries write that it calls, llmload keeps from standard output itself.
    """

    def __init__(self, module: str) -> None:
        super().__init__()
        self._package = module.partition(".")[0]
        self.heard: list[str] = []

    def write(self, text: str) -> int:
        """Keep what comes from the plugin's package, and drop the rest."""
        frame = inspect.currentframe()
        writer = frame.f_back if frame is not None else None
        name = "" if writer is None else writer.f_globals.get("__name__", "")
        if name.partition(".")[0] == self._package and text.strip():
            self.heard.append(text.strip())
        return len(text)


def _once(case: Case) -> Iterator[Found]:
    import torch

    from llmload.loading.pipeline import LoadResult

    registry = case.registry()
    try:
        with _watched(Path(case.spec["model"])) as reads:
            plan = llmload.plan(case.spec, registry=registry)
            plan.raise_for_errors()
    except LlmloadError as error:
        fix = "Give `spec=` with what the plugin wants, and mend what it says."
        yield "example", f"the plan of {_shown(case)} fails: {_told_by(error)}", fix
        return
    if case.name not in plan.plugins:
        yield "example", f"it takes no part in {_shown(case)}", "Give `spec=` with its section."
        return
    for warning in plan.warnings:
        if "could not be rehearsed" in warning.message:
            fix = "Work on values only where `not ctx.rehearsing`, and make parameters on `meta`."
            yield "rehearsal", warning.message, fix
    for read in reads:
        fix = "Read weights in `load` or `post_load`, where `ctx.rehearsing` is false."
        yield "rehearsal", f"while the plan was made {read} was read", fix
    try:
        plan.model_dump_json()
    except Exception as error:
        fix = "Record numbers, texts, lists and mappings of them."
        yield "report", f"the plan cannot be written as JSON: {_told_by(error)}", fix
    torch.manual_seed(0)
    try:
        result = llmload.load(case.spec, registry=registry)
    except Exception as error:
        rule = "plan-equals-load" if isinstance(error, llmload.AuditError) else "load"
        fix = "Mend it, or yield a Problem from `check`: what was planned is expected to load."
        yield rule, f"{_shown(case)} was planned and does not load: {_told_by(error)}", fix
        return
    assert isinstance(result, LoadResult)
    yield from _unforetold(case, plan, result)
    training = [name for name, module in result.model.named_modules() if module.training]
    if training:
        fix = "Leave `train()` to whoever trains, or undo it."
        yield "eval-mode", f"the model is in train mode at {training[0] or 'its root'!r}", fix
    try:
        result.report.model_dump_json()
    except Exception as error:
        fix = "Record numbers, texts, lists and mappings of them."
        yield "report", f"the report cannot be written as JSON: {_told_by(error)}", fix
        return
    yield from _unrepeatable(case, registry, plan, result)


def _unforetold(case: Case, plan: llmload.Plan, result: llmload.LoadResult) -> Iterator[Found]:
    """Compare what was foretold with what came."""
    fix = "Do in the rehearsal whatever changes names, shapes, dtypes and requires_grad."
    if plan.trainable_parameters is None:
        return  # nothing was promised, as another finding says
    pairs = {
        "the loader": (plan.loader, result.report.loader),
        "the number of parameters": (plan.parameters, result.report.parameters),
        "their bytes": (plan.parameter_bytes, result.report.parameter_bytes),
        "the number of trainable parameters": (plan.trainable, result.report.trainable),
        "the trainable parameters": (
            sorted(plan.trainable_parameters),
            sorted(name for name, p in result.model.named_parameters() if p.requires_grad),
        ),
    }
    if plan.loader in result.report.declined:
        del pairs["the loader"]  # it may decline in `load` too
    for what, (foretold, came) in pairs.items():
        if foretold != came:
            yield "plan-equals-load", f"the plan says {what}: {foretold}, and {came} came", fix
            return
    if case.spec.get("weights") == "random" or plan.loader == case.name:
        return  # what a loader makes of missing values no plan foretells
    parameters = {name for name, _ in result.model.named_parameters()}
    new = parameters & result.report.newly_initialised.keys() - plan.new_parameters.keys()
    for name in sorted(new)[:1]:
        fix = "Tell `ctx.newly_initialised` or `ctx.from_checkpoint`, in the rehearsal too."
        yield "plan-equals-load", f"{name!r} is new, and the plan did not say so", fix


def _unrepeatable(
    case: Case, registry: llmload.Registry, plan: llmload.Plan, first: llmload.LoadResult
) -> Iterator[Found]:
    import torch

    fix = "Keep nothing of one load on the plugin object; what a load needs goes through `ctx`."
    wanted = _digests(first.model)
    del first
    try:
        again = llmload.plan(case.spec, registry=registry)
        again.raise_for_errors()
        torch.manual_seed(0)
        second = llmload.load(case.spec, registry=registry)
    except Exception as error:
        yield "repeatable", f"the second load fails: {_told_by(error)}", fix
        return
    for key in type(plan).model_fields:
        if getattr(plan, key) != getattr(again, key):
            yield "repeatable", f"the second plan has other {key!r} than the first", fix
            return
    for what in disagreements({"model": wanted}, {"model": _digests(second.model)}):
        yield "repeatable", f"the second load of one seed gives other {what}", fix


def _told_by(error: BaseException) -> str:
    return in_one_line(error).rstrip(".")


def _shown(case: Case) -> str:
    return str({key: value for key, value in case.spec.items() if key != "model"})


# --- reading ----------------------------------------------------------------------------------

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_HEADERS = ("llmload.checkpoint.header", "llmload.checkpoint.folder", "llmload.checkpoint.contents")


@contextmanager
def _watched(folder: Path) -> Iterator[list[str]]:
    """Collect what is read of the weights in a folder, by whatever way Python code reads them.

    For a process that ends soon: the watch on opened files cannot be taken off.
    """
    import safetensors
    import torch

    from llmload.plugin import MappedCheckpoint

    reads: list[str] = []
    watching = [True]

    def note(what: str) -> None:
        if watching[0] and what not in reads:
            reads.append(what)

    def opened(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and watching[0] and isinstance(args[0], str | bytes | Path):
            path = Path(str(args[0]))
            if path.suffix in _WEIGHTS and folder in path.parents and not _reads_headers():
                note(path.name)

    sys.addaudithook(opened)
    tensor, safe_open, load = MappedCheckpoint.tensor, safetensors.safe_open, torch.load

    def of_checkpoint(self: Any, info: Any) -> Any:
        note(f"the tensor {info.name!r}")
        return tensor(self, info)

    def of_safetensors(filename: Any, *args: Any, **kwargs: Any) -> Any:
        if folder in Path(filename).parents:
            note(Path(filename).name)
        return safe_open(filename, *args, **kwargs)

    def of_pickle(f: Any, *args: Any, **kwargs: Any) -> Any:
        note("a pickle")
        return load(f, *args, **kwargs)

    with (
        _replaced(tensor, of_checkpoint, [MappedCheckpoint]),
        _replaced(safe_open, of_safetensors, list(sys.modules.copy().values())),
        _replaced(load, of_pickle, list(sys.modules.copy().values())),
    ):
        try:
            yield reads
        finally:
            watching[0] = False


@contextmanager
def _replaced(old: Any, new: Any, holders: Collection[Any]) -> Iterator[None]:
    """Put ``new`` wherever ``holders`` have ``old``, for a block."""
    places = [
        (holder, name)
        for holder in holders
        for name, value in list(getattr(holder, "__dict__", {}).items())
        if value is old
    ]
    for holder, name in places:
        setattr(holder, name, new)
    try:
        yield
    finally:
        for holder, name in places:
            setattr(holder, name, old)


def _reads_headers() -> bool:
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") in _HEADERS:
            return True
        frame = frame.f_back
    return False


# --- refusals ---------------------------------------------------------------------------------


def in_bad_order(case: Case) -> tuple[list[Found], None]:
    """Give the plugin sections that are wrong, or may be."""
    section = getattr(case.plugin, "Section", None)
    if section is None:
        return [], None
    return list(_unrefused(case, section)), None


def _unrefused(case: Case, section: Any) -> Iterator[Found]:
    registry = case.registry()
    right = case.spec.get(case.name, {})
    for what, wrong in examples.wrong_sections(right):
        error = _error_of(registry.validate, {**case.spec, case.name: wrong})
        if not isinstance(error, llmload.SpecError):
            yield _told(what, error)
    for wrong in case.bad:
        spec = {**case.spec, case.name: wrong}
        error = _error_of(_planned, spec, registry=registry)
        if not isinstance(error, RequestError):
            yield _told(str(wrong), error)
    for what, doubtful in examples.doubtful_sections(section, right):
        spec = {**case.spec, case.name: doubtful}
        error = _error_of(registry.validate, spec)
        if error is None:
            error = _error_of(_planned, spec, registry=registry)
        if error is None:
            error = _error_of(llmload.load, spec, registry=registry)
            if error is not None:
                yield (
                    "bad-sections",
                    f"with {what} the plan has no errors, and the load fails: {_told_by(error)}",
                    "Refuse it in the section, or yield a Problem from `check`.",
                )
                return
        elif not isinstance(error, RequestError):
            yield _told(what, error)
            return


def _planned(spec: Any, registry: llmload.Registry) -> None:
    llmload.plan(spec, registry=registry).raise_for_errors()


def _error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> BaseException | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(*args, **kwargs)
    except BaseException as error:
        return error
    return None


def _told(what: str, error: BaseException | None) -> Found:
    fix = "Refuse it in the section (llmload.InvalidValueError), or yield a Problem from `check`."
    if error is None:
        return "bad-sections", f"it takes {what}", fix
    return "bad-sections", f"{what} ends in {type(error).__name__}: {_told_by(error)}", fix


# --- leftovers and failures -------------------------------------------------------------------


def afterwards(case: Case, modules: list[str]) -> tuple[list[Found], None]:
    """Plan, load and fail at every hook, and look each time what is left behind.

    :param modules: what a load imports, imported first: what an import changes is no plugin's.
    """
    from llmload.testing.leftovers import snapshot

    for name in modules:
        with suppress(BaseException), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    alone = llmload.create_registry(block={case.made.name}, environ={})
    for spec in ({"model": case.spec["model"]}, case.without()):
        with suppress(LlmloadError):  # where nobody but the plugin can load it
            llmload.load(spec, registry=alone)
    gc.collect()
    gc.freeze()  # a snapshot looks for garbage, which takes long among all that was imported
    found: list[Found] = []
    before = snapshot()

    def look(when: str, allow: Collection[str] = ()) -> None:
        from llmload.testing.leftovers import changes

        nonlocal before
        after = snapshot()
        for key, how in changes(before, after).items():
            if key not in (*case.leaves, *allow):
                fix = "Change it in a context returned by `init_context`, which puts it back."
                found.append(("nothing-left-behind", f"{when}, {key}: {how}", fix))
        before = after

    llmload.plan(case.spec, registry=case.registry())
    look("after a plan")
    wanted = _seeded(case)
    look("after a load", allow=("random",))
    for hook, saboteur, error in _sabotages(case):
        found += _failing(case, hook, saboteur, error)
        look(f"after a load in which another plugin's {hook} fails")
    if any(rule == "failures" for rule, _, _ in found):
        return _unique(found), None
    try:
        different = list(disagreements({"model": wanted}, {"model": _seeded(case)}))
    except Exception as error:
        different = [f"an error: {_told_by(error)}"]
    for what in different:
        fix = "Undo in the contexts of `init_context` what a failed load must not leave."
        found.append(("failures", f"the load after those that failed gives other {what}", fix))
    return _unique(found), None


def _failing(
    case: Case, hook: str, saboteur: Saboteur, error: type[BaseException]
) -> Iterator[Found]:
    """Load beside a plugin that fails, and hold what comes to what it raised."""
    came = _error_of(llmload.load, case.spec, registry=case.registry(saboteur))
    if came is None or SABOTAGE not in str(came):
        fix = "Let contexts and `audit` be deaf to errors that are not theirs, and re-raise."
        told = "nothing" if came is None else f"{type(came).__name__}: {_told_by(came)}"
        yield "failures", f"when another plugin's {hook} fails, {told} comes", fix
    elif error is KeyboardInterrupt and not isinstance(came, KeyboardInterrupt):
        fix = "Catch Exception, not BaseException."
        yield "failures", f"Ctrl-C in {hook} comes as {type(came).__name__}", fix


def _unique(found: list[Found]) -> list[Found]:
    """Leave out what is left behind in each of several ways to fail but the first."""
    seen: dict[tuple[str, str], Found] = {}
    for one in found:
        seen.setdefault((one[0], one[1].partition(", ")[2]), one)
    return list(seen.values())


def _seeded(case: Case) -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    return _digests(llmload.load(case.spec, registry=case.registry()).model)


SABOTAGE = "sabotage by the conformance suite"


class Saboteur:
    """Fails in one hook, before or after the plugin that is tried has had its turn."""

    def __init__(self, hook: str, error: type[BaseException], **order: tuple[str, ...]) -> None:
        self.name = "conformance_saboteur"
        self._hook, self._error = hook, error
        self.after, self.before = order.get("after", ()), order.get("before", ())

    def _fail(self, hook: str, ctx: Any) -> None:
        if hook == self._hook and (hook in ("map_keys", "check") or not ctx.rehearsing):
            raise self._error(SABOTAGE)

    @llmload.hookimpl
    def map_keys(self, ctx: Any) -> dict[str, str | None]:
        """Fail, or rename nothing."""
        self._fail("map_keys", ctx)
        return {}

    @llmload.hookimpl
    def check(self, ctx: Any) -> tuple[()]:
        """Fail, or find nothing."""
        self._fail("check", ctx)
        return ()

    @llmload.hookimpl
    def init_context(self, ctx: Any) -> None:
        """Fail, or prepare nothing."""
        self._fail("init_context", ctx)

    @llmload.hookimpl
    def load(self, ctx: Any) -> Any:
        """Fail, or decline."""
        self._fail("load", ctx)
        return llmload.Decline("it loads nothing")

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        """Fail, or change nothing."""
        self._fail("post_load", ctx)
        return model

    @llmload.hookimpl
    def wrap_adapter(self, ctx: Any, model: Any) -> Any:
        """Fail, or decline."""
        self._fail("wrap_adapter", ctx)
        return llmload.Decline("it wraps nothing")

    @llmload.hookimpl
    def audit(self, ctx: Any, model: Any) -> tuple[()]:
        """Fail, or find nothing."""
        self._fail("audit", ctx)
        return ()


def _sabotages(case: Case) -> Iterator[tuple[str, Saboteur, type[BaseException]]]:
    first, last = {"before": (case.name,)}, {"after": (case.name,)}
    if case.spec.get("weights") != "random":  # else there are no keys to map
        yield "map_keys", Saboteur("map_keys", RuntimeError, **last), RuntimeError
    for hook, order, error in (
        ("check", last, RuntimeError),
        ("init_context", last, RuntimeError),
        ("load", first, RuntimeError),
        ("post_load", first, RuntimeError),
        ("post_load", first, KeyboardInterrupt),
        ("post_load", last, RuntimeError),
        ("wrap_adapter", first, RuntimeError),
        ("audit", first, RuntimeError),
        ("audit", last, KeyboardInterrupt),
    ):
        yield hook, Saboteur(hook, error, **order), error


# --- models compared --------------------------------------------------------------------------


def on_a_rank(case: Case) -> dict[str, Any]:
    """Load on one of several ranks, and return what all must agree on."""
    import torch

    torch.manual_seed(0)
    result = llmload.load(case.spec, registry=case.registry())
    plan = result.plan
    return {
        "the plan": {
            "steps": [(step.hook, step.plugin) for step in plan.steps],
            "trainable": plan.trainable_parameters,
            "new": plan.new_parameters,
        },
        "model": _digests(result.model),
    }


def disagreements(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    """Say in what two outcomes differ: the plan, or a tensor and what of it."""
    if one.get("the plan") != other.get("the plan"):
        yield "the plan"
        return
    mine, its = one["model"], other["model"]
    if mine.keys() != its.keys():
        yield f"names: {sorted(mine.keys() ^ its.keys())[0]!r}"
        return
    for name, (facts, digest) in mine.items():
        if facts != its[name][0]:
            yield f"shape, dtype or flags of {name!r}"
            return
        # What is partitioned is another part on each rank.
        if None not in (digest, its[name][1]) and digest != its[name][1]:
            yield f"values of {name!r}"
            return


def _digests(model: Any) -> dict[str, tuple[Any, str | None]]:
    """Return facts and a digest of every tensor of a model; no digest of one in parts."""
    import torch

    from llmload.plugin import partitions

    found: dict[str, tuple[Any, str | None]] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        facts = (partitions.shape(tensor), str(tensor.dtype), tensor.requires_grad)
        if (
            partitions.is_partitioned(tensor)
            or tensor.is_meta
            or type(tensor).__name__ == "LazyTensor"
        ):
            found[name] = facts, None
            continue
        digest = hashlib.sha256()
        for part in partitions.stored(tensor):
            flat = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(flat.numpy().tobytes())
        found[name] = facts, digest.hexdigest()
    return found
