"""Memory: how much there is, whether a load has room in it, and what to say when it ran out."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from llmload.checkpoint import free_memory
from llmload.context.forecast import Room
from llmload.errors import LoadFailedError, Problem, in_one_line
from llmload.spec.wording import size_text

if TYPE_CHECKING:
    from llmload.context.context import LoadContext
    from llmload.context.forecast import Forecast, Peak
    from llmload.context.machine import Machine
    from llmload.host.registry import Registry

_TORCH: Final = re.compile(r"can't allocate memory|not enough memory|out of memory", re.I)
"""What torch says in a ``RuntimeError`` when the CPU's or a device's memory ran out."""
_FIX: Final = "Give it more, load in a narrower dtype, or onto another device with `device_map`."


def free() -> Room | None:
    """Return the tightest of the limits that this system tells of, or None."""
    return min((Room(*limit) for limit in free_memory.limits()), default=None)


def problems(
    ctx: LoadContext, forecast: Forecast, peaks: Iterable[Peak], registry: Registry
) -> Iterator[Problem]:
    """Refuse a load for which there is too little memory, and warn where its training would find
    too little; say what would do.

    Pages of files are given up where memory is short, and do not count.
    """
    for peak in peaks:
        for where in forecast.rooms:
            if forecast.lacking(peak, where):
                yield _too_little(forecast, peak, where, _way_out(ctx, forecast, registry))
                return


def _too_little(forecast: Forecast, peak: Peak, where: str, fix: str) -> Problem:
    """Return what is wrong; of a training or a first use, for which there may be another machine, a
    warning."""
    loading = peak.phase in ("load", "finish")
    what = "the load" if loading else "the loaded model"
    if peak.phase == "train":
        what = f"a training with {forecast.machine.optimizer}"
    before = "" if loading else " before any activation"
    return Problem(
        severity="error" if loading else "warning",
        message=f"{what} takes {_needed(forecast, peak, where)}{before}, and"
        f" {forecast.rooms[where]}",
        fix=fix,
    )


def _needed(forecast: Forecast, peak: Peak, where: str) -> str:
    nbytes: int = getattr(peak, where)
    of = "the accelerator's memory" if where == "device" else "memory"
    ranks = forecast.sharing(where)
    if ranks == 1:
        return f"{size_text(nbytes)} of {of}"
    together = size_text(nbytes * ranks)
    return f"{size_text(nbytes)} of {of} in each of {ranks} processes, {together} together"


def rooms(machine: Machine, accelerators: int = 1) -> dict[str, Room]:
    """Return what there is on the host and on accelerators, as far as it is known.

    :param accelerators: over how many each process spreads its model.
    """
    found: dict[str, Room] = {}
    supposed = "as the plan supposes"
    if machine.host_memory is not None:
        found["host"] = Room(int(machine.host_memory), supposed, shared=True)
    elif not machine.is_elsewhere:
        here = free()
        if here is not None:
            found["host"] = here
    if machine.device_memory is not None:
        found["device"] = Room(accelerators * int(machine.device_memory), supposed)
    elif machine.is_accelerated:
        found |= _on_device(accelerators)
    return found


def _on_device(accelerators: int) -> dict[str, Room]:
    import torch

    if not torch.cuda.is_available():  # other kinds do not tell
        return {}
    if accelerators == 1:
        nbytes, _ = torch.cuda.mem_get_info()
        return {"device": Room(nbytes, "on the accelerator")}
    nbytes = sum(torch.cuda.mem_get_info(number)[0] for number in range(accelerators))
    return {"device": Room(nbytes, f"on {accelerators} accelerators")}


def _way_out(ctx: LoadContext, forecast: Forecast, registry: Registry) -> str:
    """Return what plugins say would make it fit, else what always helps."""
    asked = registry.ask("relieve", ctx=ctx, forecast=forecast)
    said = [text.rstrip(".") for _, found in asked for text in found]
    return f"{'. Or: '.join(said)}." if said else _FIX


def ran_out(error: BaseException) -> bool:
    """Say whether an error means that there was no more memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _TORCH.search(str(error)) is not None
    )


def advice(error: BaseException) -> str:
    """Return what to do about an error if memory ran out, else nothing."""
    if not ran_out(error):
        return ""
    room = free()
    return f"{room}. {_FIX}" if room else _FIX


def refusal(what: str, error: BaseException) -> LoadFailedError:
    """Return the error of a load that ran out of memory outside of any plugin."""
    return LoadFailedError(f"{what} ran out of memory: {in_one_line(error)}", fix=advice(error))
