"""The values that a model's constructor computes, and no checkpoint holds.

transformers 5 builds every model on the meta device, gives memory to what the checkpoint lacks and
has the model's class initialise it. What the class does not initialise, such as a buffer of a
user's own module, keeps whatever was in that memory; a tensor that is neither parameter nor buffer
stays on the meta device. Here each is found, and gets what the constructor gives it on the CPU. The
constructor runs a second time for that, its parameters without memory, only where one is found.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmload.checkpoint.patching import replaced
from llmload.errors import CheckpointError, Problem, in_one_line
from llmload.hf import deepspeed
from llmload.hf.v5.building import nothing_drawn_on_meta
from llmload.hf.versions import installed_transformers
from llmload.model import partitions

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from llmload.model.uninitialised import Tracker

_SMALL = 2**14
"""Elements of a parameter that keeps its values while a model is built for its other tensors: some
are computed from it."""
_BUDGET = 2**26
"""Bytes of all such parameters together."""

Build = Callable[[], "PreTrainedModel"]
"""Runs the constructor on the CPU."""


@dataclass(frozen=True)
class Computed:
    """What a model's constructor computes on the CPU."""

    tensors: dict[str, torch.Tensor]
    """Path as in :mod:`llmload.model.reachable` -> tensor; large parameters on the meta device."""
    names: dict[int, str]
    """Parameters and buffers by ``id`` -> name."""
    _storages: dict[int, str]
    _tracker: Tracker
    drew: bool
    """Whether it drew at random: another time it computes other values."""

    def value(self, path: str) -> torch.Tensor | None:
        """Return the tensor at a path if there is one and all of it has values."""
        found = self.tensors.get(path)
        if found is None or found.is_meta or not self._tracker.holds_values(found):
            return None
        return found

    def owner(self, path: str) -> str | None:
        """Return the name of the parameter or buffer that the tensor at a path is, or looks at."""
        found = self.tensors.get(path)
        if found is None:
            return None
        return self.names.get(id(found)) or self._storages.get(_storage(found))

    def is_itself(self, path: str) -> bool:
        """Say whether the tensor at a path is a parameter or buffer, not a view of one."""
        return id(self.tensors[path]) in self.names


def compute(
    build: Build, wanted: Set[str] = frozenset(), *, other_stream: bool = False
) -> Computed:
    """Run the constructor, the random state left alone.

    Parameters keep their values if they are small or ``wanted``, and have no memory otherwise.

    :param other_stream: draw other numbers than would be drawn now.
    :raises CheckpointError: the constructor does not run so.
    """
    import torch

    from llmload.model.randomness import states_kept

    large: set[int] = set()
    with states_kept():
        if wanted:
            # Names are known when the model is whole, and memory is decided on as parameters come:
            # so the first run counts them, and the second keeps those that were counted.
            building = _Building(set())
            model = building.run(build)
            large = building.indices(model, wanted)
    with states_kept():
        if other_stream:
            # What differs then was drawn, and cannot be held to a value.
            torch.manual_seed(torch.initial_seed() + 1)
        return _Building(large).computed(build)


class _Building:
    """One run of the constructor.

    :param keep: which parameters keep their values though they are large, counted as they come.
    """

    def __init__(self, keep: set[int]) -> None:
        from llmload.model.uninitialised import Tracker

        self._keep = keep
        self._tracker = Tracker()
        self._left = _BUDGET
        self._came: list[tuple[nn.Module, str]] = []
        self._moved: dict[int, tuple[weakref.ref[Any], nn.Module, str]] = {}

    def run(self, build: Build) -> PreTrainedModel:
        import torch
        from torch import nn
        from transformers import PreTrainedModel

        register = nn.Module.register_parameter
        initialise = PreTrainedModel._initialize_weights

        def register_without_memory(
            module: nn.Module, name: str, value: nn.Parameter | None
        ) -> None:
            register(module, name, value)
            if value is None or value.is_meta:
                return
            self._came.append((module, name))
            if len(self._came) - 1 in self._keep or self._affordable(value):
                return
            self._moved[id(value)] = (weakref.ref(value), module, name)
            self._tracker.forget(value)
            module._parameters[name] = type(value)(
                value.to("meta"), requires_grad=value.requires_grad
            )

        def initialise_what_can_be(model: PreTrainedModel, module: nn.Module, *args: Any) -> None:
            # It stops where it needs values that are not there: large parameters have none, and in
            # 4.51.3 the library's class runs it before a subclass has registered its buffers.
            with suppress(Exception):
                initialise(model, module, *args)

        try:
            with (
                torch.device("cpu"),
                replaced(nn.Module, {"register_parameter": register_without_memory}),
                replaced(PreTrainedModel, {"_initialize_weights": initialise_what_can_be}),
                nothing_drawn_on_meta(),
                self._tracker,
            ):
                return build()
        except Exception as error:
            raise CheckpointError(
                f"the model's constructor does not run with large parameters on the meta device:"
                f" {in_one_line(error)}"
            ) from error

    def _affordable(self, value: torch.Tensor) -> bool:
        if value.numel() > _SMALL or value.nbytes > self._left:
            return False
        self._left -= value.nbytes
        return True

    def indices(self, model: PreTrainedModel, wanted: Set[str]) -> set[int]:
        """Return which of the parameters that came, as counted, have the wanted names."""
        paths = {id(module): path for path, module in model.named_modules()}
        return {
            index
            for index, (module, name) in enumerate(self._came)
            if f"{paths.get(id(module), '')}.{name}".lstrip(".") in wanted
        }

    def computed(self, build: Build) -> Computed:
        import torch

        from llmload.model import reachable

        before = torch.get_rng_state()
        model = self.run(build)
        drew = not torch.equal(before, torch.get_rng_state())
        named = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        # Reversed, so that of tied names the first one stays.
        names = {id(tensor): name for name, tensor in reversed(named)}
        storages = {_storage(tensor): name for name, tensor in reversed(named)}
        paths = {id(module): path for path, module in model.named_modules()}
        # Its constructor may keep the parameter that was taken off the CPU: it stands for the
        # other.
        for key, (original, module, name) in self._moved.items():
            if original() is not None and id(module) in paths:
                names[key] = f"{paths[id(module)]}.{name}".lstrip(".")
        return Computed(dict(reachable.tensors(model)), names, storages, self._tracker, drew)


class Values:
    """Sees to it that all of one model has values, while and after it is loaded.

    :param build: runs the constructor of the model on the CPU.
    """

    def __init__(self, model_class: type[PreTrainedModel], build: Build) -> None:
        self._model_class = model_class
        self._build = build
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._computed: Computed | None = None

    @contextmanager
    def looked_after(self) -> Iterator[None]:
        """Let what transformers gives memory to get values too, whichever loader asks it to."""
        from transformers import PreTrainedModel

        from llmload.model.reachable import Surroundings
        from llmload.model.uninitialised import Tracker

        around = Surroundings(self._model_class)
        give_memory = installed_transformers().gives_memory()
        give = getattr(PreTrainedModel, give_memory, None)
        initialise = getattr(PreTrainedModel, "_initialize_missing_keys", None)
        if give is None or initialise is None:  # another version: the audit looks at what it left
            yield
            return
        trackers: dict[int, Tracker] = {}

        def give_noted(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            around.put_back_what_has_no_values()  # it is built, and its constructor may run again
            with trackers.setdefault(id(model), Tracker()):
                installed_transformers().give_own_kind(model, args[0] if args else ())
                return give(model, *args, **kwargs)

        def initialise_all(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            tracker = trackers.pop(id(model), None) or Tracker()
            if type(model) is not self._model_class:  # a part that a constructor loads by itself
                return initialise(model, *args, **kwargs)
            unloaded = installed_transformers().unloaded(model, args)
            split = {n: t for n, t in unloaded.items() if partitions.is_partitioned(t)}
            tracker.add(tensor for name, tensor in unloaded.items() if name not in split)
            with self._filled_from_here(model, tracker, split):
                initialised = initialise(model, *args, **kwargs)
            self.know(installed_transformers().computed(model))
            return initialised

        patched = {give_memory: give_noted, "_initialize_missing_keys": initialise_all}
        try:
            with replaced(PreTrainedModel, patched):
                yield
        finally:
            around.put_back_what_has_no_values()

    @contextmanager
    def _filled_from_here(
        self, model: PreTrainedModel, tracker: Tracker, split: Mapping[str, torch.Tensor]
    ) -> Iterator[None]:
        """Fill what a block leaves without values, of what had none before it.

        :param split: partitioned parameters among those, which have other memory whenever they are
            gathered: they are followed by what is in them.
        """
        import torch

        from llmload.model import reachable

        given = {_storage(tensor) for tensor in tracker.without_values()}
        before = torch.get_rng_state()
        for part in map(partitions.held, split.values()):
            if part is not None:
                part[0].fill_(torch.nan)
        with tracker:
            yield
        if not given and not split:
            return
        named = {name: tensor for name, tensor in reachable.registered(model) if not tensor.is_meta}
        mine = {name: tensor for name, tensor in named.items() if _storage(tensor) in given}
        left = {name: tensor for name, tensor in named.items() if not tracker.holds_values(tensor)}
        left |= partitions.with_nan(split, like=model)
        if left:
            self._fill(model, left)
        # It drew, each rank from a stream of its own: rank 0's values are for all.
        if not torch.equal(before, torch.get_rng_state()):
            buffers = {id(buffer) for buffer in model.buffers()}
            drawn = [tensor for tensor in mine.values() if id(tensor) in buffers]
            partitions.make_equal(drawn, like=model)
        self.know([*mine.values(), *left.values()])

    def know(self, tensors: Any) -> None:
        """Note that tensors have their values now, from the class or the constructor."""
        for tensor in tensors:
            # An id may come again, and a tensor may be written to: both must be seen.
            self._known[id(tensor)] = (weakref.ref(tensor), _version(tensor))

    def knows(self, tensor: torch.Tensor) -> bool:
        """Say whether a tensor is one of those, and was not written since."""
        known, version = self._known.get(id(tensor), (None, 0))
        return known is not None and known() is tensor and version == _version(tensor)

    def _fill(self, model: PreTrainedModel, left: Mapping[str, torch.Tensor]) -> None:
        computed = self.computed(set(left))
        values = {name: computed.value(name) for name in left}
        fits = {
            name: value is not None and tuple(value.shape) == partitions.shape(left[name])
            for name, value in values.items()
        }
        buffers = {name for name, value in model.named_buffers() if values.get(name) is not None}
        problems = [_no_value(n) for n, fit in fits.items() if not fit and n not in buffers]
        if problems:
            raise CheckpointError(problems)
        found = {name: value.detach() for name, value in values.items() if value is not None}
        if computed.drew:
            partitions.make_equal(found.values(), like=model)
        for name, tensor in left.items():
            if fits[name]:
                partitions.fill(tensor, found[name])
            else:  # computed from a parameter of which DeepSpeed had left a part
                path, _, attribute = name.rpartition(".")
                value = found[name].to(tensor.device)
                model.get_submodule(path).register_buffer(attribute, value, _persists(model, name))

    def computed(self, wanted: Set[str] = frozenset()) -> Computed:
        """Return what the constructor computes."""
        if self._computed is None or wanted:
            self._computed = self._compute(wanted)
        return self._computed

    def _compute(self, wanted: Set[str], *, other_stream: bool = False) -> Computed:
        from llmload.model.reachable import Surroundings

        around = Surroundings(self._model_class)
        try:
            # Under ZeRO-3 parts that are models themselves would be partitioned while built.
            with deepspeed.hidden():
                return compute(self._build, wanted, other_stream=other_stream)
        finally:
            around.put_back_what_has_no_values()

    def complete(self, model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
        """Give each tensor of a loaded model that is still on the meta device what it should be.

        That is a parameter or buffer which has its values, a view of one, or what the constructor
        computes.

        :returns: path and tensor of all that the model can reach now.
        :raises CheckpointError: one that is none of these, by its name.
        """
        from llmload.model import reachable

        found = list(reachable.tensors(model))
        self._make_others_equal(model, found)
        if not any(tensor.is_meta for _, tensor in found):
            return found
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        computed = self.computed()
        problems: list[Problem] = []
        made: dict[int, torch.Tensor] = {}

        def fill(path: str, tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_meta or path in parameters:
                return tensor
            value = _alias(model, computed, path)
            if value is None:
                computed_value = computed.value(path)
                of_another = computed.owner(path) not in (None, path)
                if computed_value is None or of_another or computed_value.shape != tensor.shape:
                    problems.append(_no_value(path))
                    return tensor
                value = made.setdefault(id(computed_value), computed_value)
            return value

        for _ in range(2):  # an alias of a buffer that comes later in the model
            problems.clear()
            reachable.replace_tensors(model, fill)
        if problems:
            raise CheckpointError(problems)
        if computed.drew:
            partitions.make_equal(made.values(), like=model)
        self.know(made.values())
        return list(reachable.tensors(model))

    def _make_others_equal(
        self, model: PreTrainedModel, found: Collection[tuple[str, torch.Tensor]]
    ) -> None:
        """Give every rank what rank 0 has outside of parameters and buffers."""
        if any(partitions.is_partitioned(tensor) for _, tensor in found):
            named = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
            others = {id(t): t for _, t in found if id(t) not in named and not t.is_meta}
            partitions.make_equal(others.values(), like=model)

    def differing(self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """Return the paths of those that differ from what the constructor computes.

        Not those that it draws at random, or does not make: they are somebody else's.
        """
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        wanted = parameters & tensors.keys()
        computed = self.computed(wanted)
        again = self._compute(wanted, other_stream=True) if computed.drew else computed
        wrong = []
        for path, tensor in tensors.items():
            value, other, owner = computed.value(path), again.value(path), computed.owner(path)
            if owner not in (None, path):
                # Another name of a parameter or buffer, which it should be or look at.
                if _storage(_get(model, owner)) != _storage(tensor):
                    wrong.append(path)
                continue
            if value is None or other is None:
                continue
            if _same(value, other) and not _same(value, tensor):
                wrong.append(path)
        return wrong


def _same(value: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Say whether both have the same bytes, cast to the second one's dtype."""
    import torch

    if value.shape != tensor.shape or tensor.is_meta:
        return False
    if not value.is_complex() and value.dtype != tensor.dtype:
        value = value.to(tensor.dtype)
    pair = (value.detach().cpu().contiguous(), tensor.detach().cpu().contiguous())
    as_bytes = [each.reshape(-1).view(torch.uint8) for each in pair]
    return torch.equal(*as_bytes)


def _alias(model: PreTrainedModel, computed: Computed, path: str) -> torch.Tensor | None:
    """Return the parameter or buffer of the model that the tensor at a path is, or looks at."""
    import torch

    name = computed.owner(path)
    if name is None or name == path:
        return None
    with suppress(AttributeError):
        owner = _get(model, name)
        if owner.is_meta:
            return None
        if computed.is_itself(path):
            return owner
        view, base = computed.tensors[path], computed.tensors[name]
        if partitions.is_partitioned(owner) or owner.stride() != base.stride():
            return None
        start = owner.storage_offset() + view.storage_offset() - base.storage_offset()
        with torch.set_grad_enabled(view.requires_grad):
            return owner.as_strided(view.shape, view.stride(), start)
    return None


def _get(model: nn.Module, name: str) -> torch.Tensor:
    path, _, attribute = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(path), attribute)
    return found


def _persists(model: nn.Module, name: str) -> bool:
    path, _, attribute = name.rpartition(".")
    return attribute not in model.get_submodule(path)._non_persistent_buffers_set


def _no_value(name: str) -> Problem:
    return Problem(
        where=name,
        message="no checkpoint key holds it, and what the model's constructor computes for it"
        " depends on weights that it has no values for yet",
        fix="Save it with the checkpoint (a persistent buffer), or compute it in the class's"
        " `_init_weights`.",
    )


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else int(tensor._version)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
