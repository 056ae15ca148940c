"""What transformers 4.51.3 reads in a config."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword is ``torch_dtype``; since 4.56 that is an old name for ``dtype``."""
    return {"torch_dtype": dtype}


def config_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """The attribute is ``torch_dtype``; it may be a name."""
    import torch

    declared: torch.dtype | str | None = getattr(config, "torch_dtype", None)
    return getattr(torch, declared) if isinstance(declared, str) else declared


def config_for(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """The class gets the config as it was read."""
    return config


def validate_to_save(config: GenerationConfig) -> None:
    """It warns, always, of what it then refuses to save."""
    config.validate()
