"""What is a dropout rate, by its name: in a model's config, and as an attribute of a module.

Model authors spell it in dozens of ways. The patterns are matched against whole names, so that
``drop_tokens`` is none, and against numbers from 0 to 1, so that the switch ``token_dropout`` of
ESM is none either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_DROPOUT = re.compile(
    # dropout, attention_dropout, attn_pdrop, hidden_dropout_prob, dropout_rate, attn_drop_rate
    r"(?:\w+_)?(?:dropout|pdrop|drop)(?:_(?:p|prob|probability|rate|ratio|value|positions))?"
)
_DISTURBANCE = re.compile(
    # LayerDrop and stochastic depth skip whole layers; jitter and SpecAugment disturb the input.
    r"(?:\w+_)?(?:layer_?drop|drop_?path|path_dropout|stochastic_depth|drop_connect)"
    r"(?:_(?:p|prob|rate))?|drop_prob|\w*jitter\w*|mask_(?:time|feature)_prob"
)


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A rate at which a model in training drops or disturbs something."""

    owner: Any
    """The config, dict or module that holds it."""
    path: str
    """Dotted path of the owner; empty for the config or model itself."""
    name: str
    """Name of the field or attribute."""
    value: float
    """Its value, from 0 to 1."""

    def __str__(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name

    def under(self, p: float) -> float:
        """Return the value it takes when dropout ``p`` is asked for.

        Rates at which whole layers are skipped or inputs are disturbed are switched off by 0 and
        left alone by any other ``p``: nobody means to skip a layer in ten by asking for 0.1.
        """
        if _DISTURBANCE.fullmatch(self.name):
            return 0.0 if p == 0.0 else self.value
        return p


def of_config(config: Any, path: str = "") -> Iterator[Rate]:
    """Yield the rates of a config and of the configs and dicts in it."""
    from transformers import PretrainedConfig

    fields = config if isinstance(config, dict) else vars(config)
    for name, value in list(fields.items()):
        if isinstance(value, dict | PretrainedConfig):
            yield from of_config(value, f"{path}.{name}" if path else str(name))
        elif _is_rate(name, value):
            yield Rate(owner=config, path=path, name=name, value=value)


def of_model(model: nn.Module) -> Iterator[Rate]:
    """Yield the rates of a model: of dropout modules, of attributes and configs of its modules.

    Forwards read their rates from any of them; some modules have a copy of the config of their own.
    """
    from torch.nn.modules.dropout import _DropoutNd
    from transformers import PretrainedConfig

    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, _DropoutNd):
            yield Rate(owner=module, path=path, name="p", value=module.p)
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, PretrainedConfig):
                if id(value) not in seen:
                    seen.add(id(value))
                    yield from of_config(value, f"{path}.{name}" if path else name)
            elif _is_rate(name, value):
                yield Rate(owner=module, path=path, name=name, value=value)


def _is_rate(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, float | int)
        and not isinstance(value, bool)
        and 0 <= value <= 1
        and bool(_DROPOUT.fullmatch(name) or _DISTURBANCE.fullmatch(name))
    )
