"""What optimizers keep beside the parameters, by the names of transformers' ``optim``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from llmload.errors import RequestError
from llmload.spec.suggest import nearest

States: TypeAlias = Callable[[tuple[int, ...], int], int]
"""Returns the bytes of the states of a parameter, of its shape and the bytes of one element."""

_BLOCK: Final = 256
"""Values that share one float32 statistic in bitsandbytes' 8-bit states."""
_KEPT_WHOLE: Final = 4096
"""Elements below which bitsandbytes keeps a state in float32."""


def _like_the_parameter(count: int) -> States:
    return lambda shape, itemsize: count * itemsize * math.prod(shape)


def _in_float32(count: int) -> States:
    return lambda shape, _: 4 * count * math.prod(shape)


def _in_8_bits(count: int) -> States:
    def states(shape: tuple[int, ...], _: int) -> int:
        elements = math.prod(shape)
        if elements < _KEPT_WHOLE:
            return 4 * count * elements
        return count * (elements + 4 * math.ceil(elements / _BLOCK))

    return states


def _adafactor(shape: tuple[int, ...], _: int) -> int:
    """A row's and a column's means of a matrix, of anything else all, in float32."""
    if len(shape) < 2:
        return 4 * math.prod(shape)
    *outer, rows, columns = shape
    return 4 * math.prod(outer) * (rows + columns)


STATES: Final[Mapping[str, States]] = {
    "adamw_torch": _like_the_parameter(2),
    "adamw_torch_fused": _like_the_parameter(2),
    "adamw_bnb_8bit": _in_8_bits(2),
    "paged_adamw_8bit": _in_8_bits(2),
    "paged_adamw_32bit": _in_float32(2),
    "lion_32bit": _in_float32(1),
    "lion_8bit": _in_8_bits(1),
    "adafactor": _adafactor,
    "adagrad": _like_the_parameter(1),
    "rmsprop": _like_the_parameter(1),
    "sgd": _like_the_parameter(0),
    "none": _like_the_parameter(0),
}
"""Optimizer -> what it keeps of one parameter. ``none`` is no training at all."""

DEFAULT: Final = "adamw_torch_fused"
"""What the Trainer of transformers takes where nobody says otherwise."""


def known(name: str) -> str:
    """Return the name of an optimizer if there is a rule for it.

    :raises RequestError: there is none.
    """
    if name not in STATES:
        raise RequestError(
            f"what the optimizer {name!r} keeps is not known",
            fix=nearest(name, STATES) or f"Known are {', '.join(sorted(STATES))}.",
            where="optimizer",
        )
    return name
