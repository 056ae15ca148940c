"""What a saved adapter says of how it was made, in a file beside it that PEFT does not read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch import nn

STAMP: Final = "llmload.json"
"""Beside ``adapter_config.json``, in which PEFT 0.13 takes no key that it does not know."""


def stamp(model: nn.Module, made: Mapping[str, Any]) -> None:
    """Have ``made`` written beside every adapter of a model, whoever saves it.

    Trainers, ``push_to_hub`` and ``save_pretrained`` of whatever wraps the model all have the
    adapter's configuration write itself, on the one process that writes.
    """
    for config in _adapter_configs(model):
        kind: Any = type(config)
        config.__class__ = _stamped(kind)
        config.__dict__[_ATTRIBUTE] = dict(made)


def _adapter_configs(model: nn.Module) -> Iterator[Any]:
    found: dict[int, Any] = {}
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict):
            found.update((id(config), config) for config in configs.values())
    return (config for config in found.values() if hasattr(config, "peft_type"))


_ATTRIBUTE: Final = "_llmload_made"


class _Stamped:
    """Goes before the class of a configuration: no field, nothing that PEFT would save or show."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration as PEFT does, and what is known of the adapter beside it."""
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        text = json.dumps(self.__dict__[_ATTRIBUTE], indent=2, ensure_ascii=False)
        (Path(save_directory) / STAMP).write_text(f"{text}\n", encoding="utf-8")

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled and copied though the class is made here: by what it is made of."""
        return _again, (type(self).__bases__[1], self.__dict__)


@cache
def _stamped(kind: Any) -> Any:
    """Return a subclass that has the name of ``kind``, or ``kind`` where it is one."""
    if issubclass(kind, _Stamped):
        return kind
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (_Stamped, kind), names)


def _again(kind: Any, state: dict[str, Any]) -> Any:
    config = object.__new__(_stamped(kind))
    config.__dict__.update(state)
    return config
