"""Proves that it happened: the model is what the plan said and the checkpoint holds."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from llmload.checkpoint.accounting import as_quantised
from llmload.checkpoint.dtypes import torch_dtype
from llmload.checkpoint.open_files import OpenFiles
from llmload.errors import AuditError, CheckpointError, Problem, some
from llmload.hf import quantised
from llmload.loading import hook_calls
from llmload.model import partitions
from llmload.spec.renaming import wrapped_by

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from llmload.checkpoint import TensorInfo
    from llmload.context.context import LoadContext
    from llmload.hf.constructor import Values
    from llmload.host.registry import Host
    from llmload.loading.plan import Plan
    from llmload.loading.report import Report

MISSING = "missing from the checkpoint"
"""Why a parameter or buffer is newly initialised that ``strict`` must excuse."""
EXCUSED = "missing from the checkpoint, as the model's class allows"
"""Why a parameter or buffer is newly initialised though ``strict`` does not mind."""

_SAMPLE = 32


def list_missing(ctx: LoadContext, model: nn.Module) -> None:
    """List what the checkpoint lacks and the loader, against its duty, said nothing of."""
    found = ctx.accounted
    if ctx.checkpoint is None or found is None or not (found.missing or found.excused):
        return
    if quantised.declared(ctx.config) is not None:
        found = as_quantised(ctx.blank, found)
    whys = dict.fromkeys(found.excused, EXCUSED)
    whys |= {name: ctx.to_initialise.get(name, MISSING) for name in found.missing}
    there = model.state_dict().keys()
    for name, why in whys.items():
        if name in there:
            ctx.newly_initialised.setdefault(name, why)


def hold_to_strict(ctx: LoadContext, lost: Mapping[str, str], unexpected: Iterable[str]) -> None:
    """Refuse parameters without a value in the checkpoint, and checkpoint keys without a parameter.

    :param lost: name of each parameter and buffer of the base model that has no value -> why.
    :param unexpected: keys of the checkpoint for which the model has no place.
    :raises CheckpointError: one that ``strict`` does not excuse. With ``weights: random`` there is
        nothing to hold the model to.
    """
    if ctx.checkpoint is None:
        return
    exceptions = ctx.spec.key_exceptions
    missing = [
        name
        for name, why in lost.items()
        if why != EXCUSED and name not in ctx.to_initialise and not exceptions.allows_missing(name)
    ]
    unexpected = [name for name in unexpected if not exceptions.allows_unexpected(name)]
    problems = []
    if missing:
        problems.append(
            Problem(
                where="strict",
                message=f"the checkpoint has no values for {some(missing)}",
                fix="Map the keys with `key_map`, or list what may be newly initialised in"
                " `strict: {allow_missing: [...]}`.",
            )
        )
    if unexpected:
        problems.append(
            Problem(
                where="strict",
                message=f"the model has no place for {some(unexpected)} of the checkpoint",
                fix=_unwrapping(unexpected, ctx.checkpoint.tensors)
                + "Map the keys with `key_map`, or list what may be left out in"
                " `strict: {allow_unexpected: [...]}`.",
            )
        )
    if problems:
        raise CheckpointError(problems)


def _unwrapping(keys: list[str], stored: Iterable[str]) -> str:
    """Return the rules by which keys lose the names of wrappers, where all of them have some.

    transformers 4.51 has put the base model's prefix before what it did not expect.
    """
    rules = wrapped_by(keys) or wrapped_by(list(stored))
    return f"Write `key_rules: [{', '.join(rules)}]`, which undoes that. Or: " if rules else ""


def excused(
    ctx: LoadContext, lost: Mapping[str, str], unexpected: Sequence[str]
) -> Iterable[Problem]:
    """Name, as warnings, what ``strict: false`` let pass; exceptions by name were asked for."""
    if ctx.spec.strict is not False:
        return
    missing = [
        name
        for name, why in lost.items()
        if why != EXCUSED and name not in ctx.to_initialise and ctx.checkpoint is not None
    ]
    for names, what in (
        (missing, "the checkpoint has no values for {}, which are newly initialised"),
        (unexpected, "the model has no place for {} of the checkpoint, which are left out"),
    ):
        if names:
            yield Problem(
                where="strict",
                severity="warning",
                message=what.format(some(names)),
                fix="Name them in `strict` if this is meant.",
            )


def hold_to_claims(ctx: LoadContext) -> None:
    """Refuse tensors that a plugin took out of the checkpoint and then did nothing with.

    :raises AuditError: it neither read one nor said why it is left out.
    """
    if ctx.unused:
        raise AuditError(
            f"{some(ctx.unused)} of the checkpoint were claimed by a plugin in map_keys, which"
            " neither read them nor said why they are left out",
            fix="The plugin is at fault; report this to its makers.",
        )


def compare_with_checkpoint(ctx: LoadContext, model: nn.Module, lost: Collection[str]) -> Compared:
    """Hold the first and last values of each parameter and buffer against the file's bytes.

    Only tensors that the checkpoint holds as they are, under this name or another, after the cast
    to the tensor's dtype; merged, split and quantised ones are for the loader to account for. Of a
    partitioned one, this rank's part. Works for every loader alike and reads two small pieces of
    each tensor.

    :param lost: names that have no value from the checkpoint.
    :returns: what was compared.
    :raises AuditError: values differ.
    """
    from llmload.model import reachable

    compared = Compared(0 if ctx.checkpoint is None else len(ctx.checkpoint.tensors))
    if ctx.checkpoint is None or ctx.awaiting is not None:
        return compared
    computed = _computed(model)
    infos = dict(ctx.checkpoint.tensors)
    if ctx.accounted is not None:
        infos |= ctx.accounted.as_stored
    # Codes of a quantised checkpoint may be floats of 8 bits, and mean nothing without their scale.
    dequantised = quantised.declared(ctx.config) is not None
    for name, tensor in reachable.registered(model):
        info = infos.get(name)
        if info is None or name in lost or name in computed:
            continue
        if not _comparable(info, tensor):
            continue
        if dequantised and torch_dtype(info.dtype) != tensor.dtype and info.dtype[:2] == "F8":
            continue
        compared.take(name, info, tensor)
    with OpenFiles(ctx.checkpoint.files) as files:
        compared.read(files)
    wrong = compared.differing()
    if wrong:
        raise AuditError(
            f"{some(wrong)} differ from the checkpoint after loading",
            fix="Try another loader with `-p no:NAME`, and report this.",
        )
    return compared


def _computed(model: nn.Module) -> set[str]:
    """Return the buffers that a model computes and no checkpoint is read for, though one may hold
    them: rotary frequencies, which old ones store in half precision."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }


def _comparable(info: TensorInfo, tensor: torch.Tensor) -> bool:
    stored = torch_dtype(info.dtype)
    return (
        stored is not None
        and partitions.shape(tensor) == info.shape
        and not tensor.is_meta
        and not partitions.wraps(tensor)
        and tensor.is_contiguous()
        and (stored == tensor.dtype or (stored.is_floating_point and tensor.is_floating_point()))
    )


class Compared:
    """First and last elements of many tensors, as stored and as loaded: cast and compared at once,
    because an operation of torch for each would take longer than to read them.

    :param stored: tensors in the checkpoint.
    """

    def __init__(self, stored: int) -> None:
        self._stored = stored
        self._tensors: dict[str, torch.Tensor] = {}
        self._sizes: dict[str, int] = {}
        self._found: dict[Any, list[tuple[str, int, int]]] = {}
        self._places: list[tuple[Path, int, int]] = []
        self._pieces: list[bytearray] = []

    def take(self, name: str, info: TensorInfo, tensor: torch.Tensor) -> None:
        """Note both ends of a tensor, or of the part of it that this process holds."""
        held = partitions.held(tensor)
        self._tensors[name] = tensor
        if held is None or held[0].numel() == 0:
            return  # none of it is in this process's memory
        flat, first = held
        self._sizes[name] = flat.numel()
        stored = torch_dtype(info.dtype)
        assert stored is not None  # _comparable saw to it
        count = min(_SAMPLE, flat.numel())
        found = self._found.setdefault((stored, tensor.dtype), [])
        for start in {0, flat.numel() - count}:
            place = info.start + (first + start) * stored.itemsize
            self._places.append((info.file, place, count * stored.itemsize))
            found.append((name, len(self._places) - 1, start))

    def read(self, files: OpenFiles) -> None:
        """Read what was noted, all of it at once."""
        self._pieces = files.pieces(self._places)

    def differing(self) -> list[str]:
        """Return the names of those that are not as stored, bit by bit after the cast."""
        import torch

        wrong: dict[str, None] = {}
        for (stored, dtype), found in self._found.items():
            raw = bytearray().join(self._pieces[number] for _, number, _ in found)
            # As bytes, so that NaN equals NaN and -0.0 differs from 0.0.
            expected = torch.frombuffer(raw, dtype=stored).to(dtype).view(torch.uint8)
            data = expected.numpy().tobytes()
            at = 0
            for name, ends in groupby(found, key=itemgetter(0)):
                flat = self._held(name, dtype)
                for _, number, start in ends:
                    count = len(self._pieces[number]) // stored.itemsize
                    piece = data[at : at + count * dtype.itemsize]
                    if flat is None or _bytes(flat, start, count) != piece:
                        wrong[name] = None
                    at += count * dtype.itemsize
        return list(wrong)

    def _held(self, name: str, dtype: torch.dtype) -> torch.Tensor | None:
        """Return what this process holds of a tensor, if it has the dtype and size it had."""
        held = partitions.held(self._tensors[name])
        if held is None or held[0].dtype != dtype or held[0].numel() != self._sizes[name]:
            return None
        return held[0]

    def follow(self, moved: Mapping[int, torch.Tensor]) -> None:
        """Look from here on at what took the place of tensors, by their identities."""
        self._tensors = {name: moved.get(id(t), t) for name, t in self._tensors.items()}

    def handed_out(self, model: nn.Module) -> tuple[int, list[str]]:
        """Count the tensors that the finished model has as they are stored, and say so.

        Plugins may have replaced, merged, cast or resized others since they were compared.
        """
        from llmload.model import reachable

        if not self._stored:
            return 0, []
        there = {id(tensor) for _, tensor in reachable.registered(model)}
        gone = {name for name, tensor in self._tensors.items() if id(tensor) not in there}
        changed = len(gone.union(self.differing()))
        held = len(self._tensors) - changed
        said = (
            f"{held} of the checkpoint's {self._stored} tensors are in the model as they are"
            " stored, by their first and last values"
        )
        if changed:
            said += f"; {changed} more were, and plugins have changed them since"
        others = self._stored - len(self._tensors)
        if others:
            said += (
                f"; {others} could not be compared, as they were converted, quantised or left out"
            )
        return held, [said]


def _bytes(flat: torch.Tensor, start: int, count: int) -> bytes:
    """Return the bytes of some elements of a flat, contiguous tensor."""
    if flat.device.type == "cpu":
        return ctypes.string_at(flat.data_ptr() + start * flat.itemsize, count * flat.itemsize)
    return _bytes(flat[start : start + count].cpu(), 0, count)


_NUMBERS = {
    "parameters": "elements in all parameters",
    "parameter_bytes": "bytes of all parameters",
    "trainable": "elements in trainable parameters",
}
"""Attribute of plan and report alike -> what it counts."""


def kept_apart(plan: Plan, base: nn.Module) -> list[torch.Tensor]:
    """Return the parameters that the plan counts as tied and the loader left with values of their
    own, because the checkpoint holds others for them. Headers do not tell that."""
    if not plan.tied:
        return []
    named = dict(base.named_parameters(remove_duplicate=False))
    names: dict[int, int] = {}
    for parameter in named.values():
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    return [named[name] for name in plan.tied if name in named and names[id(named[name])] == 1]


def saved_by_others(ctx: LoadContext, model: nn.Module) -> int:
    """Return by how many bytes a quantised checkpoint's weights differ from what was planned.

    Where no plugin answers for them, transformers makes tensors that wrap codes, and only then are
    their sizes known.
    """
    if ctx.providing("quantisation"):
        return 0
    return sum(
        partitions.nbytes(p) - partitions.elements(p) * p.element_size()
        for p in model.parameters()
        if partitions.wraps(p)
    )


def hold_to_numbers(
    plan: Plan, report: Report, apart: Sequence[torch.Tensor], unforeseen: int
) -> list[str]:
    """Hold every number of the report against the plan's.

    :param apart: parameters that the plan may count with others they are not tied to after all.
    :param unforeseen: bytes that are there beside, or if negative instead of, those planned.
    :returns: what was proved, for the report.
    :raises AuditError: one differs.
    """
    if plan.trainable_parameters is None:
        return []
    own = {
        "parameters": sum(map(partitions.values, apart)),
        "parameter_bytes": sum(map(partitions.nbytes, apart)),
        "trainable": sum(partitions.values(p) for p in apart if p.requires_grad),
    }
    beside = dict.fromkeys(_NUMBERS, 0) | {"parameter_bytes": unforeseen}
    problems = []
    for number, what in _NUMBERS.items():
        planned, found = getattr(plan, number), getattr(report, number)
        if found - planned - beside[number] not in (0, own[number]):
            problems.append(
                Problem(
                    message=f"{planned:,} {what} were planned, and there are {found:,}",
                    fix="A loader or plugin does otherwise than in the rehearsal: try without it,"
                    " and report this.",
                )
            )
    if problems:
        raise AuditError(problems)
    planned = f"where {plan.parameter_bytes:,} were planned" if unforeseen else "as planned"
    return [f"{report.parameters:,} parameters in {report.parameter_bytes:,} bytes, {planned}"]


def hold_to_constructor(
    ctx: LoadContext,
    model: Any,
    values: Values,
    reached: Iterable[tuple[str, torch.Tensor]],
    lost: Mapping[str, str],
) -> list[str]:
    """Prove that what no checkpoint holds was written: missing parameters, buffers, and tensors in
    other places.

    Each must be known as filled by the model's class or its constructor, and not to be written
    since; any other is held to what the constructor computes, which runs again for that.

    A partitioned parameter is left to whoever filled it, part by part.

    :param reached: path and tensor of all that the model can reach.
    :param lost: name of each parameter and buffer without a value from the checkpoint -> why. What
        a plugin has answered for is its own matter.
    :returns: what was proved, for the report; nothing where there was nothing to prove.
    :raises AuditError: one has other values.
    """
    if ctx.checkpoint is None or ctx.awaiting is not None:
        return []
    state = model.state_dict(keep_vars=True)
    missing = {name for name, why in lost.items() if why in (MISSING, EXCUSED)}
    filled = {
        _storage(tensor)
        for name, tensor in state.items()
        if name not in missing or partitions.is_partitioned(tensor)
    }
    found = {path: tensor for path, tensor in reached if _storage(tensor) not in filled}
    known = {_storage(tensor) for tensor in found.values() if values.knows(tensor)}
    others = {path: tensor for path, tensor in found.items() if _storage(tensor) not in known}
    if others:  # to tell what a quantised weight brought along from what a constructor made
        own = set(map(_storage, _carried(state.values())))
        found = {path: tensor for path, tensor in found.items() if _storage(tensor) not in own}
        others = {path: tensor for path, tensor in others.items() if path in found}
    wrong = values.differing(model, others) if others else []
    if wrong:
        raise AuditError(
            f"{some(wrong)} differ from what the model's constructor computes, and no checkpoint"
            " holds them",
            fix="The loader did not fill them; try another with `-p no:NAME`, and report this.",
        )
    if not found:
        return []
    return [f"{len(found)} tensors that no checkpoint holds have the values of the model's class"]


def _carried(tensors: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    from llmload.model import reachable

    for tensor in tensors:
        if not partitions.is_partitioned(tensor):
            yield from reachable.carried(tensor)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def prove(ctx: LoadContext, plan: Plan, model: nn.Module, *, run: bool) -> list[str]:
    """Check the finished model: no meta tensor, trainable set as planned, a gradient path.

    :param run: run its forward also where all or nothing is trainable.
    :returns: what was proved, a sentence each, for the report.
    :raises AuditError: with every fault at once.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    problems = [*_trainable(plan, named)]
    if ctx.awaiting is None:
        problems += _meta_tensors(model)
    if problems:
        raise AuditError(problems)
    said = ["no tensor is on the meta device"]
    if ctx.awaiting is not None:
        said = [f"the weights come with {ctx.awaiting}"]
    if plan.trainable_parameters is None:
        said.append("the trainable set was not promised by the plan")
    else:
        said.append(f"{len(plan.trainable_parameters)} parameters are trainable, as planned")
    trainable = [p.requires_grad for p in {id(p): p for _, p in named}.values()]
    return [*said, _forward(ctx, model, trainable, run=run)]


def _meta_tensors(model: nn.Module) -> Iterable[Problem]:
    from llmload.model import reachable

    names = [name for name, tensor in reachable.tensors(model) if tensor.is_meta]
    if names:
        yield Problem(
            message=f"{some(names)} have no values: they are still on the meta device",
            fix="The loader did not fill them; try another with `-p no:NAME`, and report this.",
        )


def _trainable(plan: Plan, named: Iterable[tuple[str, nn.Parameter]]) -> Iterable[Problem]:
    if plan.trainable_parameters is None:
        return
    planned = set(plan.trainable_parameters)
    names_of: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            names_of.setdefault(parameter, []).append(name)
    # Tied parameters have several names, of which the plan has one.
    extra = {names[0] for names in names_of.values() if planned.isdisjoint(names)}
    # Not tied after all, because the checkpoint holds both with different values.
    extra -= {name for name in extra if name.endswith(tuple(plan.tied))}
    missing = planned.difference(*names_of.values())
    for names, what in ((extra, "are"), (missing, "are not")):
        if names:
            yield Problem(
                message=f"{some(sorted(names))} {what} trainable, against the plan",
                fix="A plugin acts on the loaded model otherwise than in the rehearsal.",
            )


def _forward(ctx: LoadContext, model: nn.Module, trainable: Sequence[bool], *, run: bool) -> str:
    """Run the model where that can tell something, and say whether the loss reaches what is
    trained; raise where it does not run, or the loss reaches nothing.

    A forward on stand-ins takes some 80 ms for 12 layers and 200 ms for 32, with its backward twice
    that.

    :param trainable: of each parameter, whether it is.
    """
    some_trained = any(trainable)
    if not run and (not some_trained or all(trainable)):
        # Nothing is frozen: whatever the output is computed with requires gradients.
        return (
            f"{'every' if some_trained else 'no'} parameter is trainable, so no gradient path was"
            " looked for, and no forward was run"
        )
    found = ctx.probe(model)
    if found.method == "unavailable":
        what = "the gradient path was not looked at" if some_trained else "the forward was not run"
        return f"{what}: {found.reason}"
    if not some_trained:
        return "a forward on token ids runs; no parameter is trainable"
    reached = sum(trainable) - len(found.unreached)
    if not reached:
        raise AuditError(
            "no gradient reaches any trainable parameter",
            fix="The forward detaches its output, or runs without gradients: mend the class."
            if all(trainable)
            else "With reentrant gradient checkpointing and a frozen base, inputs must require"
            " gradients: use the section `gradient_checkpointing`.",
        )
    return f"gradients reach {reached} of {sum(trainable)} trainable parameters"


def ask(host: Host, plugin: str, ctx: LoadContext, model: nn.Module) -> list[Problem]:
    """Let a plugin prove its part of the plan, and return its warnings.

    :raises AuditError: it found errors.
    """
    found = list(hook_calls.findings(host, plugin, "audit", ctx=ctx, model=model))
    errors = [problem for problem in found if problem.severity == "error"]
    if errors:
        raise AuditError(errors)
    return found
