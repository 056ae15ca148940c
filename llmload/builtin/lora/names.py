"""Names that transformers 5 changed, for adapters and targets that were written for version 4.

PEFT translates them as it goes; here the same translation is asked for beforehand, so that names
are held against the model as PEFT will see them. Versions without a translation change nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from torch import nn


def _translation() -> Any:
    try:
        # Missing before peft 0.19; importable with transformers 5 only.
        from peft.utils import transformers_weight_conversion
    except ImportError:
        return None
    return transformers_weight_conversion


def translate_targets(config: LoraConfig, model: nn.Module) -> None:
    """Change the targets of ``config`` to today's names, in place.

    :raises ValueError: from PEFT, where only some of the layers that are fused today are targets.
    """
    translation = _translation()
    if translation is not None:
        translation.convert_peft_config_for_transformers(config, model, None)


def translate_weights(
    model: PeftModel, tensors: dict[str, torch.Tensor], adapter: str, known: Collection[str]
) -> dict[str, torch.Tensor]:
    """Return a saved adapter's tensors under today's names, without the adapter's name.

    Names that all fit stay: a pattern for old ones may match one of today's, as that of Laguna
    for ``mlp.shared_expert.`` does.

    :param known: the names that the model has a place for.
    """
    translation = _translation()
    if translation is None or tensors.keys() <= set(known):
        return tensors
    converted: dict[str, torch.Tensor] = (
        translation.convert_peft_adapter_state_dict_for_transformers(
            model=model,
            peft_config=model.peft_config[adapter],
            adapter_state_dict=tensors,
            adapter_name=adapter,
        )
    )
    return converted


@contextmanager
def names_taken_as_they_are() -> Iterator[None]:
    """Keep PEFT from translating names of weights once more."""
    translation = _translation()
    if translation is None:
        yield
        return
    name = "convert_peft_adapter_state_dict_for_transformers"
    theirs = getattr(translation, name)
    setattr(translation, name, lambda adapter_state_dict, **_: adapter_state_dict)
    try:
        yield
    finally:
        setattr(translation, name, theirs)
