"""What transformers 5 reads in a config."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword is ``dtype``."""
    return {"dtype": dtype}


def config_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """The attribute is ``dtype``; it may be a name."""
    import torch

    declared: torch.dtype | str | None = getattr(config, "dtype", None)
    return getattr(torch, declared) if isinstance(declared, str) else declared


def config_for(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """A class that takes only the text part of a composite model gets only its config."""
    text = getattr(config, "sub_configs", {}).get("text_config")
    if text is None or getattr(model_class, "config_class", None) != text:
        return config
    quantization = getattr(config, "quantization_config", None)
    config = config.get_text_config()
    if quantization is not None:
        config.quantization_config = quantization
    return config


def validate_to_save(config: GenerationConfig) -> None:
    """Where it has changed since it was read, what is a warning otherwise is an error."""
    config.validate(strict=True)
