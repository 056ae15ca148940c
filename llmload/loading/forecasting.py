"""What a load will take of memory: counted from the rehearsed model, corrected by the plugins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from llmload.checkpoint.dtypes import torch_dtype
from llmload.checkpoint.staging import BUFFER, MOST_BUFFERS, WORTH_PINNING
from llmload.context.forecast import PHASES, Cost, Forecast, Peak, Place, Weight
from llmload.errors import PluginError
from llmload.hf import installed_transformers, quantised
from llmload.loading import hook_calls, room
from llmload.loading.memory import Item, Memory, PhasePeak, Route
from llmload.model import partitions
from llmload.spec.values import dtype_name

if TYPE_CHECKING:
    from llmload.checkpoint.accounting import Accounting
    from llmload.context.context import LoadContext
    from llmload.host.registry import Host
    from llmload.loading.plan import Plan
    from llmload.loading.rehearsal import Rehearsal

ALLOCATOR = "freed, and kept by the allocator"
_MOST_KEPT = 2**25
"""Bytes of a freed block up to which glibc raises the bound below which it takes blocks from its
heap. At the heap's end it keeps twice as many: mallopt(3), ``M_MMAP_THRESHOLD``."""
_ON_CPU = (None, "cpu", {"": "cpu"})
"""Values of ``device_map`` that leave everything on the host."""


def foretell(host: Host, plan: Plan, rehearsal: Rehearsal) -> Forecast:
    """Count what each weight takes, then let every plugin of the load correct and add to it.

    :raises LoadFailedError: a plugin's ``cost`` failed.
    :raises PluginError: it yielded something that is no cost.
    """
    ctx = rehearsal.ctx
    forecast = Forecast(
        machine=ctx.machine,
        rooms=room.rooms(ctx.machine, _accelerators(plan.device_map)),
        accelerated=ctx.machine.is_accelerated,
    )
    routes = _Routes(ctx, plan, rehearsal)
    for name, parameter in rehearsal.parameters.items():
        forecast.weights[name] = routes.finished(name, parameter)
    for name, parameter in routes.replaced():
        forecast.replaced[name] = routes.loaded(name, parameter)
    for plugin in host.implementing("cost"):
        for cost in hook_calls.call(host, plugin, "cost", ctx=ctx, forecast=forecast) or ():
            if not isinstance(cost, Cost):
                raise PluginError(
                    f"plugin {host.describe(plugin)} yielded a {type(cost).__name__} from cost,"
                    " which may yield llmload.plugin.Cost"
                )
            forecast.costs.append(replace(cost, plugin=cost.plugin or plugin))
    forecast.costs += _of_host(rehearsal, forecast)
    if plan.loader in ctx.providing("placement"):
        forecast.costs += _staging(forecast)
    return forecast


def _accelerators(device_map: Mapping[str, int | str]) -> int:
    """Return over how many accelerators one process spreads its model, at least one."""
    return max(1, len({*device_map.values()} - {"cpu"}))


def _of_host(rehearsal: Rehearsal, forecast: Forecast) -> Iterator[Cost]:
    """Yield buffers, and the largest weight that has to wait until another stands for it."""
    buffers = {id(buffer): buffer.nbytes for buffer in rehearsal.model.buffers()}
    yield Cost(what="buffers", nbytes=sum(buffers.values()), phase="load", lasting=True)
    early = [c for c in forecast.costs if c.phase in ("load", "finish")]
    passing = [c.nbytes for c in early if not c.lasting and c.place == "host"]
    if passing:
        kept = 2 * min(max(passing), _MOST_KEPT)
        yield Cost(what=ALLOCATOR, nbytes=kept, phase="load", lasting=True)
    waiting = [weight.part(weight.loaded) for weight in forecast.replaced.values()]
    if waiting:
        yield Cost(what="the largest weight that is replaced", nbytes=max(waiting), phase="finish")


def _staging(forecast: Forecast) -> Iterator[Cost]:
    """Yield the pinned memory through which weights go to an accelerator, where one is worth it."""
    weights = (*forecast.weights.values(), *forecast.replaced.values())
    sent = [w.stored // w.parts for w in weights if w.place == "device" and w.since == "load"]
    if max(sent, default=0) >= WORTH_PINNING:
        nbytes = min(MOST_BUFFERS, math.ceil(sum(sent) / BUFFER)) * BUFFER
        yield Cost(what="pinned, on the way to the accelerator", nbytes=nbytes, phase="load")


class _Routes:
    """Says of each parameter how its values get where they are."""

    def __init__(self, ctx: LoadContext, plan: Plan, rehearsal: Rehearsal) -> None:
        self._ctx, self._plan, self._rehearsal = ctx, plan, rehearsal
        self._accounting = _accounting(ctx)
        self._names: dict[int, list[str]] = {}
        for name, parameter in rehearsal.base.items():
            self._names.setdefault(id(parameter), []).append(name)
        self._keeps_pages = plan.loader in ctx.providing("mapped_pages")
        self._on_device = ctx.spec.device_map not in _ON_CPU
        self._spread = len({*plan.device_map.values()}) > 1
        stored = ctx.checkpoint
        self._fetched = {file.path for file in stored.fetched} if stored is not None else set()

    def replaced(self) -> Iterator[tuple[str, Any]]:
        """Yield the parameters of the base model that the finished one lacks, tied ones once."""
        finished = self._rehearsal.parameters.values()
        still = {id(parameter) for parameter in finished if self._rehearsal.is_plain(parameter)}
        for key, names in self._names.items():
            if key not in still and names[0] not in self._rehearsal.apart:
                yield names[0], self._rehearsal.base[names[0]]

    def finished(self, name: str, parameter: Any) -> Weight:
        """Return a parameter of the finished model, loaded or made by a plugin."""
        if self._rehearsal.is_plain(parameter):
            weight = self.loaded(name, parameter)
            weight.itemsize = self._rehearsal.itemsize(parameter)
            # In another dtype than the loader left it: no page of a file has it so.
            weight.on_pages = weight.on_pages and weight.itemsize == weight.loaded
        else:
            by = self._plan.new_parameters.get(name, "")
            shape = partitions.shape(parameter)
            route, why = "new", "not in the checkpoint"
            if id(parameter) in self._names:
                route, why = "resized", "a plugin gave it another shape"
            weight = self._made(name, parameter, shape, route, why, by)
            weight.elements, weight.itemsize = _split(partitions.nbytes(parameter), parameter)
            weight.since = "finish"
        weight.trained = parameter.requires_grad
        return weight

    def loaded(self, name: str, parameter: Any) -> Weight:
        """Return a parameter of the base model as the loader leaves it."""
        names = self._names[id(parameter)]
        shape = self._rehearsal.shapes[names[0]]
        itemsize = self._rehearsal.loaded_itemsize(names, parameter)
        kind = torch_dtype("F32") if itemsize == 4 else self._ctx.dtype
        whole = math.prod(shape) * itemsize
        route, why, stored = self._way(names, parameter, whole, kind)
        weight = self._made(name, parameter, shape, route, why, self._plan.loader)
        weight.stored, weight.loaded = stored, itemsize
        weight.on_pages = route == "mapped"
        return weight

    def _made(
        self, name: str, parameter: Any, shape: tuple[int, ...], route: str, why: str, by: str
    ) -> Weight:
        return Weight(
            name=name,
            parameter=parameter,
            shape=shape,
            elements=math.prod(shape),
            itemsize=0,
            loaded=0,
            route=route,
            why=why,
            by=by,
            stored=0,
            trained=False,
            place=self._place(name),
            # Hooks bring it to the accelerator for each use, and back.
            stays=self._spread and self._place(name) == "host",
        )

    def _place(self, name: str) -> Place:
        """Return where the loader leaves a parameter: with the innermost module that has a place.

        One that a plugin adds may have its module's name behind that of a wrapper.
        """
        places = self._plan.device_map
        if not places:
            return "device" if self._on_device else "host"
        parts = name.split(".")
        spans = ((i, j) for i in range(len(parts)) for j in range(len(parts), i, -1))
        paths = (".".join(parts[i:j]) for i, j in spans)
        path = next((path for path in paths if path in places), "")
        return "host" if places.get(path, "cpu") == "cpu" else "device"

    def _way(self, names: list[str], parameter: Any, whole: int, kind: Any) -> tuple[str, str, int]:
        """Return route, reason, and bytes in the checkpoint."""
        found = self._accounting
        if found is None:
            if self._ctx.checkpoint is None:
                return "new", "the spec asks for random weights", 0
            return "copied", f"`{self._plan.loader}` reads it as it likes", whole
        info = next((found.as_stored[name] for name in names if name in found.as_stored), None)
        if info is not None:
            return *self._of_one(names[0], info, parameter, kind), info.nbytes
        joined = next((found.assembled[name] for name in names if name in found.assembled), None)
        if joined is not None:
            return "assembled", "put together from tensors of the file", joined.nbytes
        if {*found.missing, *found.excused}.issuperset(names):
            return "new", "not in the checkpoint", 0
        return "computed", "transformers computes it from tensors of the file", whole

    def _of_one(self, name: str, info: Any, parameter: Any, kind: Any) -> tuple[str, str]:
        wanted = kind if parameter.is_floating_point() else parameter.dtype
        if torch_dtype(info.dtype) != wanted:
            return "cast", f"{info.dtype} in the file, {dtype_name(wanted)} in the model"
        if self._place(name) == "device":
            return "copied", "to the accelerator"
        if info.file in self._fetched:
            return "copied", "its file lies on no disk of this machine"
        if not self._keeps_pages:
            return "copied", f"`{self._plan.loader}` keeps no weight on the pages of files"
        return "mapped", "stored as the model has it"


def _accounting(ctx: LoadContext) -> Accounting | None:
    """Return how keys fit, of a checkpoint of which headers tell it."""
    if ctx.checkpoint is None or installed_transformers().unsuited() is not None:
        return None
    if quantised.declared(ctx.config) is not None:
        return None
    return ctx.accounting(ctx.blank)


def _split(nbytes: int, parameter: Any) -> tuple[int, int]:
    """Return elements and bytes of one; of what wraps other tensors, single bytes."""
    elements = partitions.elements(parameter)
    itemsize = nbytes // elements if elements else 1
    return (elements, itemsize) if elements * itemsize == nbytes else (nbytes, 1)


def told(forecast: Forecast, peaks: Iterable[Peak]) -> Memory:
    """Return a forecast and its peaks as plan and report have them."""
    machine = forecast.machine
    assert not isinstance(machine.host_memory, str)
    assert not isinstance(machine.device_memory, str)
    return Memory(
        ranks=machine.processes,
        ranks_per_host=machine.on_a_host,
        host_memory=machine.host_memory,
        device_memory=machine.device_memory,
        optimizer=machine.optimizer,
        phases=[
            PhasePeak(phase=peak.phase, host=peak.host, pages=peak.pages, device=peak.device)
            for peak in peaks
        ],
        items=list(_items(forecast)),
        routes=[_route(weight) for weight in forecast.weights.values()],
    )


def _route(weight: Weight) -> Route:
    return Route(
        name=weight.name,
        shape=weight.shape,
        stored_bytes=weight.stored,
        kept_bytes=weight.part(weight.itemsize),
        route=weight.route,
        why=weight.why,
        plugin=weight.by,
    )


def _items(forecast: Forecast) -> Iterator[Item]:
    """Yield the weights by route and place as they are once used, then all other costs."""
    for route, by, since, place, on_pages, nbytes in forecast.sums("use"):
        where: Literal["host", "device", "pages"] = "pages" if on_pages else place
        yield Item(
            what=f"weights, {route}",
            plugin=by,
            phase=since,
            place=where,
            nbytes=nbytes,
            lasting=True,
        )
    for cost in sorted([*forecast.costs, *forecast.training()], key=_in_order):
        if cost.nbytes:
            yield Item(
                what=cost.what,
                plugin=cost.plugin,
                phase=cost.phase,
                place=cost.place,
                nbytes=cost.nbytes,
                lasting=cost.lasting,
            )


def _in_order(cost: Cost) -> int:
    return list(PHASES).index(cost.phase)
