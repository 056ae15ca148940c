"""What FSDP2 takes of memory: each rank's rows, and the units that are gathered to be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from llmload.plugin import WORTH_MAPPING, Cost, Forecast, Weight
from llmload_fsdp.sizes import Sizes

if TYPE_CHECKING:
    from llmload_fsdp.section import ParallelSection


def divide(
    forecast: Forecast, section: ParallelSection, sizes: Sizes, *, reads_rows: bool
) -> Iterator[Cost]:
    """Let every weight be divided by rows among the ranks that share a copy of the model.

    :param reads_rows: whether each rank reads its rows and nothing else; where not, what the whole
        takes meanwhile is yielded.
    """
    ranks = sizes.fsdp
    on_device = forecast.accelerated and not section.fsdp_cpu_offload
    forecast.states_on_host = section.fsdp_cpu_offload
    whole = sum(weight.elements * weight.loaded + weight.beside for weight in _loaded(forecast))
    for weight in (*forecast.weights.values(), *forecast.replaced.values()):
        rows = weight.parameter.shape[0]
        even = not rows % ranks
        width = weight.elements // max(_filled_up(rows, weight.parts), 1)
        weight.elements = _filled_up(rows, ranks) * width
        weight.parts, weight.stays = ranks, section.fsdp_cpu_offload
        weight.place = "device" if on_device else "host"
        worth = even and weight.part(weight.loaded) >= WORTH_MAPPING
        weight.on_pages = weight.on_pages and reads_rows and not forecast.accelerated and worth
        if weight.since == "load" and weight.route in ("mapped", "copied", "cast", "assembled"):
            weight.route = "mapped part" if weight.on_pages else "part"
            weight.why = f"1 of {ranks} parts, {weight.why}"
    if not reads_rows:
        parts = sum(weight.part(weight.loaded) for weight in _loaded(forecast))
        yield Cost(what="the whole, of which a part is kept", nbytes=whole - parts, phase="load")


def _filled_up(rows: int, ranks: int) -> int:
    """Return the rows of all ranks, each filled up to those of the first one, which has most."""
    return -(-rows // ranks) * ranks


def fewest_ranks(
    forecast: Forecast, section: ParallelSection, freed: Iterable[str], *, reads_rows: bool
) -> int | None:
    """Return the smallest power of two of ranks for which there is room, or None.

    :param freed: as :func:`gathered` has it.
    :param reads_rows: as :func:`divide` has it.
    """
    names = list(freed)

    def divided(tried: Forecast) -> None:
        ranks, over = divmod(tried.machine.processes, section.dp_replicate_size)
        if over or not ranks:
            return
        sizes = Sizes(ranks, section.dp_replicate_size, 1, 1)
        tried.costs = [cost for cost in tried.costs if cost.plugin != "parallel"]
        tried.costs += divide(tried, section, sizes, reads_rows=reads_rows)
        tried.costs += gathered(tried, section, names, ranks)

    return forecast.fewest_ranks(divided)


def _loaded(forecast: Forecast) -> Iterable[Weight]:
    every = (*forecast.weights.values(), *forecast.replaced.values())
    return (weight for weight in every if weight.since == "load")


def gathered(
    forecast: Forecast, section: ParallelSection, freed: Iterable[str], ranks: int
) -> Iterator[Cost]:
    """Yield what is gathered at a time: all that no block has, one block, and the next one, which
    is fetched meanwhile and copied once; in training the gradients of one unit too, twice.

    :param freed: names of the units whose weights are let go after their forward, in the base.
    """
    if ranks == 1:
        return
    blocks: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    names = list(freed)
    for weight in forecast.weights.values():
        narrow = section.fsdp_mixed_precision and weight.itemsize > 2
        nbytes = weight.elements * (2 if narrow else weight.itemsize)
        unit = next((name for name in names if f".{name}." in f".{weight.name}"), "")
        blocks[unit] += nbytes
        trained[unit] += nbytes * weight.trained
    rest = blocks.pop("", 0)
    largest = max(blocks.values(), default=0)
    place: Any = "device" if forecast.accelerated else "host"
    found = rest + (3 if len(blocks) > 1 else 2) * largest
    yield Cost(what="gathered weights", nbytes=found, phase="use", place=place)
    found += 2 * max(trained.values(), default=0)
    yield Cost(what="gathered weights and gradients", nbytes=found, phase="train", place=place)
