"""What a load will take of memory, as data that plugins correct before it happens."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

from llmload.context.optimizers import STATES
from llmload.spec.wording import size_text

if TYPE_CHECKING:
    from typing_extensions import Self

    from llmload.context.machine import Machine

Place: TypeAlias = Literal["host", "device"]
Phase: TypeAlias = Literal["load", "finish", "use", "train"]
PHASES: Final[dict[Phase, str]] = {
    "load": "the base model is loaded",
    "finish": "plugins finish it",
    "use": "every weight has been used once",
    "train": "gradients and optimizer are there",
}
"""Phase -> what has happened at its end."""
_MOST_RANKS: Final = 4096


@dataclass(slots=True, kw_only=True, eq=False)
class Weight:
    """One parameter of the finished model, or one of the base model that a plugin replaces.

    Tied names are one. What a plugin's ``cost`` changes here holds for plan, problems and report.
    """

    name: str
    """In the finished model; of one that is replaced, in the base model."""
    parameter: Any
    """The rehearsed one, on the meta device: a plugin finds its own by it."""
    shape: tuple[int, ...]
    """Of the whole."""
    elements: int
    """That are stored for the whole; of codes that share a byte, bytes."""
    itemsize: int
    """Bytes of one of them in the finished model; 0 of one that is replaced."""
    loaded: int
    """Bytes of one of them as the loader leaves it."""
    route: str
    """How its values get where they are: ``mapped``, ``cast``, ``copied``, ``assembled``,
    ``computed``, ``new``, ``replaced``, or a word of the plugin that stores it."""
    why: str
    """Why so, in a few words."""
    by: str
    """The plugin that makes it."""
    stored: int
    """Bytes of it in the checkpoint."""
    trained: bool
    """Whether it requires gradients."""
    since: Phase = "load"
    """The phase in which it gets memory."""
    on_pages: bool = False
    """Whether it stays on the pages of the checkpoint's files, which take no memory of their own
    until somebody writes to them."""
    place: Place = "host"
    """Where the loader leaves it."""
    stays: bool = False
    """Whether it is there in training too, though there are accelerators."""
    parts: int = 1
    """Processes among which it is divided."""
    beside: int = 0
    """Bytes that each process keeps of it beside its part, such as statistics of a quantisation."""

    def part(self, itemsize: int) -> int:
        """Return what one process keeps of it, in elements of so many bytes."""
        whole = math.ceil(self.elements / self.parts) * itemsize
        return whole + self.beside if itemsize else 0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Memory that one process takes beside the weights."""

    what: str
    """In a few words: ``quantisation scratch``."""
    nbytes: int
    """Bytes."""
    phase: Phase
    """When: see :data:`PHASES`."""
    lasting: bool = False
    """Whether it is kept from then on. Of what is not, the largest of a phase counts."""
    place: Place = "host"
    """Where."""
    plugin: str = ""
    """Whose; the host fills it in."""


@dataclass(frozen=True, slots=True)
class Peak:
    """The most that one process has at a time in one phase, in bytes."""

    phase: Phase
    host: int
    pages: int
    """Of the checkpoint's files, which are in memory once used and are given up where it is short.
    """
    device: int


class Room(NamedTuple):
    """Memory that there is."""

    nbytes: int
    limit: str
    """What there is no more of."""
    shared: bool = False
    """Whether all processes of a host share it."""

    def __str__(self) -> str:
        return f"{size_text(self.nbytes)} of memory are free ({self.limit})"


@dataclass(slots=True, kw_only=True)
class Forecast:
    """All that one process will have in memory; activations and what Python takes are not in it."""

    machine: Machine
    """What the plan is made for."""
    weights: dict[str, Weight] = field(default_factory=dict)
    """Of the finished model, by name."""
    replaced: dict[str, Weight] = field(default_factory=dict)
    """Of the base model, by name: those in whose place the finished model has others. The loader
    fills them first, unless a plugin that stores them otherwise on the way takes them out."""
    costs: list[Cost] = field(default_factory=list)
    """What plugins and host said."""
    rooms: Mapping[str, Room] = field(default_factory=dict)
    """What there is of host and device, as far as it is known."""
    accelerated: bool = False
    """Whether there is an accelerator: there a model is trained, unless a weight ``stays``."""
    in_float32: bool = False
    """Whether the optimizer keeps a copy of the parameters in float32, and states of it."""
    states_on_host: bool = False
    """Whether gradients and optimizer are kept on the host, though there are accelerators."""

    def supposing(self, **changes: Any) -> Self:
        """Return a copy whose weights can be changed, with other fields for this one's."""
        copied = {
            field: {name: copy.copy(weight) for name, weight in getattr(self, field).items()}
            for field in ("weights", "replaced")
        }
        return replace(self, **{**copied, "costs": list(self.costs), **changes})

    def fewest_ranks(self, divide: Callable[[Self], None]) -> int | None:
        """Return the smallest power of two of ranks for which there is room, or None.

        :param divide: divides the weights of a copy among the ranks of its ``machine``.
        """
        ranks = self.machine.processes
        while ranks <= _MOST_RANKS:
            tried = self.supposing(machine=replace(self.machine, ranks=ranks))
            divide(tried)
            if tried.suffices():
                return ranks
            ranks = 2 ** (math.floor(math.log2(ranks)) + 1)
        return None

    # --- what comes of it -------------------------------------------------------------------------

    def peaks(self) -> list[Peak]:
        """Return the peak of each phase; without a training where nothing is trained."""
        training = self.training()
        phases = [phase for phase in PHASES if phase != "train" or training]
        return [self._peak(phase, training) for phase in phases]

    def suffices(self) -> bool:
        """Whether what there is does for every phase, on each host for all of its processes."""
        return not any(self.lacking(peak, where) for peak in self.peaks() for where in self.rooms)

    def lacking(self, peak: Peak, where: str) -> bool:
        """Whether a peak is more than there is of host or device."""
        room = self.rooms.get(where)
        needed: int = getattr(peak, where)
        return room is not None and needed * self.sharing(where) > room.nbytes

    def sharing(self, where: str) -> int:
        """Return how many processes share what there is of host or device."""
        room = self.rooms.get(where)
        return self.machine.on_a_host if room is not None and room.shared else 1

    @property
    def trains(self) -> bool:
        """Whether a training is part of it."""
        trained = any(weight.trained for weight in self.weights.values())
        return trained and self.machine.optimizer != "none"

    def training(self) -> list[Cost]:
        """Return gradients and optimizer, as costs of the host."""
        if not self.trains:
            return []
        gradients = states = 0
        rule = STATES[self.machine.optimizer]
        for weight in self.weights.values():
            if not weight.trained or not weight.itemsize:
                continue
            part = math.ceil(weight.elements / weight.parts)
            # A part is laid out flat; so are the states of it.
            shape = weight.shape if weight.parts == 1 else (part,)
            gradients += part * weight.itemsize
            states += rule(shape, 4 if self.in_float32 else weight.itemsize)
            states += 4 * part * self.in_float32
        place: Place = "device" if self.accelerated and not self.states_on_host else "host"
        name = self.machine.optimizer
        return [
            Cost(what="gradients", nbytes=gradients, phase="train", lasting=True, place=place),
            Cost(what=f"optimizer {name}", nbytes=states, phase="train", lasting=True, place=place),
        ]

    def sums(self, phase: Phase) -> Iterator[tuple[str, str, Phase, Place, bool, int]]:
        """Yield route, plugin, since when, place, whether on pages, and bytes of the weights in a
        phase."""
        found: dict[tuple[str, str, Phase, Place, bool], int] = {}
        order, trains = list(PHASES), self.trains
        for weight in (*self.weights.values(), *self.replaced.values()):
            if order.index(weight.since) > order.index(phase):
                continue
            nbytes = weight.part(weight.loaded if phase == "load" else weight.itemsize)
            place = weight.place
            if phase in ("use", "train") and self.accelerated and not weight.stays:
                place = "device"
            written = phase == "train" and trains and weight.trained
            on_pages = weight.on_pages and place == "host" and not written
            key = weight.route, weight.by, weight.since, place, on_pages
            found[key] = found.get(key, 0) + nbytes
        for key, nbytes in found.items():
            if nbytes:
                yield *key, nbytes

    def _peak(self, phase: Phase, training: list[Cost]) -> Peak:
        taken: dict[str, int] = {"host": 0, "pages": 0, "device": 0}
        for _, _, _, place, on_pages, nbytes in self.sums(phase):
            if not on_pages:
                taken[place] += nbytes
            elif phase in ("use", "train"):  # a loader lets go of the pages that it looked at
                taken["pages"] += nbytes
        order = list(PHASES)
        there = set(order[: order.index(phase) + 1])
        passing = {"host": 0, "device": 0}
        for cost in (*self.costs, *training):
            if cost.lasting:
                taken[cost.place] += cost.nbytes if cost.phase in there else 0
            elif cost.phase == phase:
                passing[cost.place] = max(passing[cost.place], cost.nbytes)
        for where, nbytes in passing.items():
            taken[where] += nbytes
        return Peak(phase, **taken)
