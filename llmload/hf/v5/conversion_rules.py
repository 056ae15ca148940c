"""transformers' conversion rules for one model, without making those of every other model.

The first time that anything asks for a rule, transformers 5 makes the rules of all its models, each
with a regular expression to compile: half the time of loading a model that needs none of them. Here
its own two functions run with other names in their globals: rules are noted, and made when they are
found to be the model's. Nothing of transformers is changed, and nothing is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property, partial
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rules_of(model: PreTrainedModel) -> list[Any]:
    """What ``get_model_conversion_mapping(model)`` returns, new: rules remember what they matched.

    Where transformers has made all rules already, perhaps with some that the user registered, it is
    asked.
    """
    from transformers import conversion_mapping

    ask: Any = conversion_mapping.get_model_conversion_mapping
    if conversion_mapping._checkpoint_conversion_mapping_cache is None:
        ask = _with_globals(ask, {"get_checkpoint_conversion_mapping": noted_rules()})
    found: list[Any] = ask(model, None, None)
    return found


def noted_rules() -> Callable[[str], list[Any] | None]:
    """Return what stands for ``get_checkpoint_conversion_mapping``: rules by class or type."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightTransform

    kinds = {
        name: partial(_Note, kind)
        for name, kind in vars(conversion_mapping).items()
        if isinstance(kind, type) and issubclass(kind, WeightTransform)
    }
    notes = _with_globals(conversion_mapping._build_checkpoint_conversion_mapping, kinds)()

    def find(name: str) -> list[Any] | None:
        found = notes.get(name)
        # Several names may have the same rules, and each is given its own.
        return None if found is None else copy.deepcopy([note.rule for note in found])

    return find


def _with_globals(function: Any, names: dict[str, Any]) -> Any:
    """Return a function that does the same with other meanings of some of its global names."""
    return FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


class _Note:
    """A rule that is made when it is looked at."""

    def __init__(self, kind: Any, *args: Any, **kwargs: Any) -> None:
        self._made_from = (kind, args, kwargs)

    @cached_property
    def rule(self) -> Any:
        kind, args, kwargs = self._made_from
        return kind(*args, **kwargs)

    @property
    def _original_source_patterns(self) -> list[str]:
        """As they were given: 5.24 looks through those of one model to make those of another."""
        _, args, kwargs = self._made_from
        patterns = args[0] if args else kwargs["source_patterns"]
        return [patterns] if isinstance(patterns, str) else list(patterns)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)
