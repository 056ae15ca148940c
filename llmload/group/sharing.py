"""What models of one group have in common in memory: found out beforehand, weight by weight.

Two models read the same checkpoint. What both keep at its dtype lies on the files' own pages, which
the system holds once. What both cast alike and neither trains can be cast once: see
:mod:`llmload.group.memory`. What a model trains is written by its first step, so that sharing
it would only put the copy off.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import BaseModel

from llmload.checkpoint.dtypes import torch_dtype
from llmload.group import memory as memory
from llmload.hf import installed_transformers
from llmload.spec.values import dtype_name

if TYPE_CHECKING:
    from llmload.context.context import LoadContext
    from llmload.loading.prepared import Prepared
    from llmload.loading.rehearsal import Rehearsal

How: TypeAlias = Literal["checkpoint pages", "one cast", "adapter off", "frozen copy"]


class Sharing(BaseModel):
    """What one member of a group has in common with an earlier one."""

    member: str
    """The member that needs no memory of its own."""
    of: str
    """The member whose memory it is."""
    how: How
    """``checkpoint pages``: both map the files; ``one cast``: both map one cast copy; ``adapter
    off`` and ``frozen copy``: both run the same base weights."""
    saved_bytes: int
    """Bytes that the member would take with a copy of its own. A report counts the casts that were
    found there, and everything else as planned."""
    lasting: bool = True
    """False where training ends it: a step writes all these weights, and each page that is written
    becomes the writer's own. The other member's values never change."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter of a member's base model, tied ones together."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    elements: int
    size: int
    """Bytes at its final dtype."""
    origin: Hashable
    """Where it lies in the files, or what decides how it is made of what lies there."""
    mapped: bool
    """It will lie on the checkpoint's own pages."""
    dtype: str
    """The final one; modules that stay float32 considered."""
    kept: bool
    """The finished model has it as it was loaded, and does not train it."""
    written: bool
    """The load itself writes to it, as a merge does, or puts another in its place."""

    def same_as(self, other: Entry) -> bool:
        """Say whether both hold the same values, dtypes apart."""
        return (self.origin, self.shape) == (other.origin, other.shape)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the load of one member will do with each of its weights."""

    dtype: str
    source: Hashable
    """The files that are read; None for random weights."""
    entries: Mapping[str, Entry]
    """By a name that does not depend on the head: without the prefix of the base model."""
    alone: str
    """Why nothing of it can be shared, or empty."""

    @classmethod
    def of(cls, prepared: Prepared) -> Weights:
        """Read them off the rehearsal, the checkpoint's headers and the plan."""
        alone, entries = _why_alone(prepared), {}
        if not alone and prepared.ctx.checkpoint is not None:
            assert prepared.rehearsal is not None  # else it is alone
            entries = _entries(prepared.ctx, prepared.plan.loader, prepared.rehearsal)
        return cls(
            dtype=dtype_name(prepared.ctx.dtype),
            source=_files(prepared.ctx),
            entries=entries,
            alone=alone,
        )

    def elements(self, found: Iterable[str]) -> dict[str, int]:
        """Return some of its entries by their names in the member's base model -> elements."""
        held = [self.entries[one] for one in found]
        return {name: entry.elements for entry in held for name in entry.names}


def _files(ctx: LoadContext) -> Hashable:
    if ctx.checkpoint is None:
        return None
    return tuple((str(file.path), file.identity, file.version) for file in ctx.checkpoint.files)


def _why_alone(prepared: Prepared) -> str:
    ctx = prepared.ctx
    if prepared.plan.loader not in ctx.providing("placement"):
        return f"`{prepared.plan.loader}` loads it, and stores its weights as it likes"
    if ctx.placed_by is not None:
        return f"`{ctx.placed_by}` stores its weights in its own way, anew for each model"
    if ctx.spec.device_map not in (None, "cpu", {"": "cpu"}):
        return "`device_map` places it outside the CPU's memory"
    if prepared.rehearsal is None:
        return "the load could not be rehearsed, so nothing is known of what it trains"
    return memory.unavailable() or ""


def conversion(ctx: LoadContext) -> str:
    """Return a digest of all that decides how tensors of the files are merged, split or permuted
    into a weight of a certain name."""
    assert ctx.checkpoint is not None
    tensors = [(i.name, str(i.file), i.start) for i in ctx.checkpoint.tensors.values()]
    text = repr((ctx.model_class, ctx.config.to_dict(), tensors))
    return hashlib.sha256(text.encode()).hexdigest()


def _entries(ctx: LoadContext, loader: str, rehearsal: Rehearsal) -> dict[str, Entry]:
    assert ctx.checkpoint is not None
    accounting = ctx.accounting(ctx.blank)
    dtypes = installed_transformers().final_dtypes(ctx.blank, accounting, ctx.dtype)
    stored, missing = accounting.as_stored, {*accounting.missing, *accounting.excused}
    # One entry for each parameter, tied names together: it takes memory once.
    aliases: dict[int, list[str]] = {}
    for name, parameter in rehearsal.base.items():
        aliases.setdefault(id(parameter), []).append(name)
    kept, written = rehearsal.kept(), rehearsal.written()
    on_pages = loader in ctx.providing("mapped_pages")
    fetched = {file.path for file in ctx.checkpoint.fetched}
    prefix = f"{ctx.model_class.base_model_prefix}."
    naming = cache(partial(conversion, ctx))
    entries = {}
    for names in aliases.values():
        parameter = rehearsal.base[names[0]]
        # A tied weight may be in the file under one of its names, or under both with equal values.
        found = [name for name in names if name in stored]
        # Of no file: each member draws its own.
        if missing.issuperset(names):
            continue
        # Of tied ones it is the first that stays.
        dtype = dtypes[(found or names)[0]]
        # A reward model calls `layers.0` what the language model calls `model.layers.0`.
        entries[names[0].removeprefix(prefix)] = Entry(
            names=tuple(names),
            shape=tuple(parameter.shape),
            elements=parameter.numel(),
            size=parameter.numel() * dtype.itemsize,
            # By the place in the files rather than by name: members may rename keys in different
            # ways.
            origin=frozenset((str(stored[name].file), stored[name].start) for name in found)
            or naming(),
            mapped=on_pages
            and any(
                torch_dtype(stored[name].dtype) == dtypes[name] and stored[name].file not in fetched
                for name in found
            ),
            dtype=dtype_name(dtype),
            kept=names[0] in kept,
            written=names[0] in written,
        )
    return entries


@dataclass(frozen=True)
class Found:
    """What the members of a group will have in common."""

    shared: list[Sharing]
    apart: dict[str, str]
    """Members that read an earlier member's checkpoint, and why they get a cast of their own."""
    cast_once: dict[str, dict[str, int]]
    """By member: parameters to cast once, by their names in its base model -> elements."""


def find(members: Mapping[str, Prepared]) -> Found:
    """Compare every member with those that will be loaded before it."""
    files = {name: _files(made.ctx) for name, made in members.items()}
    read_by = Counter(files.values())
    weights = {
        name: Weights.of(made)
        for name, made in members.items()
        if files[name] is not None and read_by[files[name]] > 1
    }
    shared: list[Sharing] = []
    apart: dict[str, str] = {}
    together: dict[str, set[str]] = {name: set() for name in weights}
    # Members load in this order, so that each can only have in common what an earlier one has. What
    # is found with one is not looked for with the next: it saves its bytes once.
    for at, (name, mine) in enumerate(weights.items()):
        left, reason = dict(mine.entries), ""
        for other in list(weights)[:at]:
            theirs = weights[other]
            if theirs.source != mine.source:
                continue
            if mine.alone or theirs.alone:
                reason = reason or mine.alone or f"of {other!r}: {theirs.alone}"
                continue
            pages, casts, others = _common(mine, theirs, left)
            shared += _told(name, other, mine, theirs, pages, casts)
            # Both sides: the earlier one must cast into the common memory for the later one to find
            # it.
            together[name] |= casts
            together[other] |= casts
            left = {one: entry for one, entry in left.items() if one not in pages | casts}
            if others:
                reason = reason or _why_apart(name, other, mine, theirs, others)
        # All on pages: the reason why nothing was cast once does not matter then.
        if reason and (mine.alone or any(not entry.mapped for entry in left.values())):
            apart[name] = reason
    once = {name: weights[name].elements(found) for name, found in together.items() if found}
    return Found(shared, apart, once)


def _common(
    mine: Weights, theirs: Weights, left: Iterable[str]
) -> tuple[set[str], set[str], set[str]]:
    """Return what lies on the files' pages, what can be cast once, and what else is the same."""
    both = {
        one
        for one in left
        if one in theirs.entries and mine.entries[one].same_as(theirs.entries[one])
    }
    # Pages of a file are shared even where one member trains: copy-on-write gives it its own. What
    # a load writes to is its own from the start. A cast is made for it, so it is worth sharing only
    # where both keep it.
    pages = {
        one
        for one in both
        if all(w.entries[one].mapped and not w.entries[one].written for w in (mine, theirs))
    }
    others = both - pages
    casts = {
        one
        for one in others
        if mine.entries[one].kept
        and theirs.entries[one].kept
        and mine.entries[one].dtype == theirs.entries[one].dtype
    }
    return pages, casts, others - casts


def _told(
    name: str, other: str, mine: Weights, theirs: Weights, pages: set[str], casts: set[str]
) -> Iterator[Sharing]:
    if pages:
        yield Sharing(
            member=name,
            of=other,
            how="checkpoint pages",
            saved_bytes=sum(mine.entries[one].size for one in pages),
            lasting=all(mine.entries[one].kept and theirs.entries[one].kept for one in pages),
        )
    if casts:
        size = sum(mine.entries[one].size for one in casts)
        yield Sharing(member=name, of=other, how="one cast", saved_bytes=size)


def _why_apart(name: str, other: str, mine: Weights, theirs: Weights, left: set[str]) -> str:
    if mine.dtype != theirs.dtype:
        return f"it is {mine.dtype}, and {other!r} is {theirs.dtype}"
    trained = {
        who: sum(not weights.entries[n].kept for n in left)
        for who, weights in ((other, theirs), (name, mine))
    }
    who, count = max(trained.items(), key=lambda item: item[1])
    return (
        f"{who!r} trains or replaces {count} of these weights, and its first step would copy what"
        " was shared"
    )
