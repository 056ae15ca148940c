"""What transformers' weight conversion gives: finished tensors, taken in place of a quantiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from llmload.hf.v5.lazy_tensors import Taken, as_stored, assembled

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmload.checkpoint.placer import Placer

Receive = Callable[[str, "dict[str, torch.Tensor]"], "dict[str, torch.Tensor]"]
"""Takes the first target's name and the finished tensors by name; returns what to set there."""


class Handover:
    """What transformers takes for a quantiser and its operation."""

    # For a "quantiser" of weights that are not quantised yet, transformers reads in its own thread,
    # one target after the other; else it reads ahead in a pool. `Receiver` tells by that what is
    # whose.
    pre_quantized = False

    def __init__(self, receive: Receive) -> None:
        self._receive = receive

    def param_needs_quantization(self, model: PreTrainedModel, name: str) -> bool:
        """Every parameter and buffer is ours to place."""
        return True

    def get_quantize_ops(self) -> Handover:
        """The operation that runs after all others."""
        return self

    def convert(
        self, collected: dict[str, Any], *, full_layer_name: str, **others: Any
    ) -> dict[str, torch.Tensor]:
        """Give on the finished tensors, which come alone or in a list of one."""
        values = {
            name: value[0] if isinstance(value, list) else value
            for name, value in collected.items()
        }
        return self._receive(full_layer_name, values)


class AbortError(BaseException):
    """Carries an error past transformers, which would note any ``Exception`` and go on."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class Dtypes:
    """Decides on final dtypes as transformers does: by its plan, else by what the model declares.

    :param plan: pattern of names -> dtype.
    :param state: the model's tensors by name.
    """

    def __init__(self, plan: Mapping[str, torch.dtype], state: Mapping[str, torch.Tensor]) -> None:
        from transformers.core_model_loading import build_glob_alternation

        self._plan = plan
        self._state = state
        self._pattern, self._pattern_of_group, _ = build_glob_alternation(list(plan))

    def of(self, name: str) -> torch.dtype:
        """Return the final dtype of a parameter or buffer."""
        match = self._pattern.search(name) if self._plan else None
        if match is None:
            return self._state[name].dtype
        return self._plan[self._pattern_of_group[match.lastgroup]]


class Receiver:
    """Finds out what each finished tensor was made of, and has it placed.

    :param taken: the tensors of the file that were asked for since the last one was finished.
    """

    def __init__(self, placer: Placer, dtypes: Dtypes, taken: Taken) -> None:
        self._placer = placer
        self._dtypes = dtypes
        self._taken = taken

    def __call__(self, first: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Place ``values``.

        :raises AbortError: around whatever goes wrong.
        """
        try:
            return self._receive(first, values)
        except Exception as error:
            raise AbortError(error) from error

    def _receive(self, first: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from llmload.checkpoint.assembled import itself

        read = self._taken.copy()
        self._taken.clear()
        dtype = self._dtypes.of(first)
        infos = as_stored(read, values)
        if infos is not None:
            return {
                name: self._placer.place(name, dtype, itself(value), infos[name])
                for name, value in values.items()
            }
        behind = [info for info, _ in read]
        found = assembled(read, values)
        if found is not None:
            return {
                name: self._placer.place(name, dtype, value, None, behind)
                for name, value in found.items()
            }
        made = {name: itself(value) for name, value in values.items()}
        self._placer.read_for_conversion(behind)
        # A view of what was read (a transpose, a chunk) still lies on the file's pages, which may
        # go only when it is placed. What was computed has memory of its own.
        if not _share_storage(made.values(), (itself(tensor) for _, tensor in read)):
            self._placer.drop(behind)
            behind = []
        return {
            name: self._placer.place(name, dtype, value, None, behind)
            for name, value in made.items()
        }


def _share_storage(values: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> bool:
    of_values, of_others = (
        {tensor.untyped_storage().data_ptr() for tensor in tensors} for tensors in (values, others)
    )
    return not of_values.isdisjoint(of_others)
