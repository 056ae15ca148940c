"""A model of transformers 4.51.3 without storage: as :mod:`llmload.hf.building`.

Buffers have their values from the constructor and are not on the meta device.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from llmload.checkpoint.patching import replaced

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


def build(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    dtype: torch.dtype,
    without_memory: AbstractContextManager[Any] | None = None,
    *,
    asked: bool,
) -> PreTrainedModel:
    """The model with its parameters on the meta device, weights not tied but by the constructor.

    :param without_memory: takes the place of the meta device.
    :param asked: whether the dtype was asked for; for ``auto`` the parts of a config keep theirs.
    """
    import torch
    from transformers.modeling_utils import no_init_weights, restore_default_torch_dtype

    @restore_default_torch_dtype  # type: ignore[untyped-decorator]
    def construct(config: PretrainedConfig) -> PreTrainedModel:
        torch.set_default_dtype(dtype)
        if not getattr(config, "_attn_implementation_autoset", False):
            config = model_class._autoset_attn_implementation(
                config, use_flash_attention_2=False, torch_dtype=dtype, device_map=None
            )
        with no_init_weights(), without_memory or _parameters_on_meta():
            return model_class(config)

    config = copy.deepcopy(config)
    parts = (getattr(config, name) for name in config.sub_configs) if asked else ()
    for part in (config, *parts):
        part.torch_dtype = dtype
    return construct(config)


def _parameters_on_meta() -> AbstractContextManager[None]:
    """As accelerate's ``init_empty_weights``, but parameters of one object stay one: a plan has to
    see what the constructor ties."""
    from torch import nn

    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        register(module, name, value)
        if value is not None and not value.is_meta:
            module._parameters[name] = _anew(value, value.to("meta"))

    return replaced(nn.Module, {"register_parameter": register_on_meta})


def tie(model: PreTrainedModel) -> PreTrainedModel:
    """Tie a model that :func:`build` made as ``from_pretrained`` does: by the config alone.

    It builds with ``init_empty_weights``, which takes apart what the constructor ties.
    """
    seen = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = _anew(parameter, parameter.data)
            seen.add(id(parameter))
    model.tie_weights()
    return model


def _anew(parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    """Another object like a parameter, over other data."""
    return type(parameter)(data, **vars(parameter), requires_grad=parameter.requires_grad)
