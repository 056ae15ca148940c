"""A model of transformers 5 without storage, as ``from_pretrained`` builds it before it reads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

from llmload.checkpoint.patching import replaced
from llmload.hf.v5.relied_on import unsuited

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


_DRAWS = ("kaiming_uniform_", "normal_", "ones_", "uniform_", "xavier_uniform_", "zeros_")
"""What the constructors of torch's own modules initialise with."""


def blank(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    stored: Container[str] = (),
    asked: bool = True,
) -> PreTrainedModel:
    """The model on the meta device with its buffers, weights not tied."""
    if unsuited() is None:
        return _build(model_class, config, dtype)
    with ExitStack() as stack:
        for context in model_class.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        # Private functions differ: the plan still wants a model to look at, and the streaming
        # loader declines.
        return model_class(copy.deepcopy(config))


def to_fill(blank: PreTrainedModel) -> PreTrainedModel:
    """As it is: weights are tied once they are filled."""
    return blank


def built_under(
    context: AbstractContextManager[Any],
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    asked: bool,
) -> PreTrainedModel:
    """With the meta device beneath the context, which every model is made for."""
    with context:
        return _build(model_class, config, dtype)


def _build(
    model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """Build as ``from_pretrained`` does."""
    from transformers.modeling_utils import _get_dtype
    from transformers.monkey_patching import patch_output_recorders

    # Also sets the dtype in sub-configs, from which some heads take theirs.
    config, dtype = _get_dtype(dtype, None, copy.deepcopy(config), None, None, True, None)
    with ExitStack() as stack:
        for context in model_class.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        stack.enter_context(nothing_drawn_on_meta())
        model = model_class(config)
        patch_output_recorders(model)
    return model


def construct(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    asked: bool = True,
) -> PreTrainedModel:
    """As for a model without storage, but for the meta device."""
    import torch
    from transformers.modeling_utils import _get_dtype

    config, dtype = _get_dtype(dtype, None, copy.deepcopy(config), None, None, True, None)
    with ExitStack() as stack:
        # As if DeepSpeed's context were open already: nobody is to open it here.
        for context in model_class.get_init_context(dtype, False, True, None):
            if isinstance(context, torch.device):
                break  # what follows is for the meta device too
            stack.enter_context(context)
        return model_class(config)


def nothing_drawn_on_meta() -> AbstractContextManager[None]:
    """Pass over the first values of tensors that have none: a third of the time to build a model.

    ``transformers.initialization.no_init_weights`` is for all tensors, and returns none of them.
    """
    from torch.nn import init

    def passing_over(draw: Callable[..., Any]) -> Callable[..., Any]:
        def pass_over(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            # What is built on the CPU meanwhile, such as a part that a constructor loads, has
            # values.
            return tensor if tensor.is_meta else draw(tensor, *args, **kwargs)

        return pass_over

    return replaced(init, {name: passing_over(getattr(init, name)) for name in _DRAWS})


def no_init_weights() -> AbstractContextManager[Any]:
    """transformers' own."""
    from transformers.initialization import no_init_weights

    found: AbstractContextManager[Any] = no_init_weights()
    return found


def is_post_initialised(model: PreTrainedModel) -> bool:
    """It leaves the tied names behind."""
    return hasattr(model, "all_tied_weights_keys")


def adapters_left_alone() -> AbstractContextManager[None]:
    """Let ``from_pretrained`` find no adapter beside the weights."""
    from transformers.integrations import peft

    return replaced(peft, {"find_adapter_config_file": lambda *args, **options: None})


def tied_names(model: PreTrainedModel) -> set[str]:
    """Each model has its pairs."""
    return set(ties(model))


def ties(model: PreTrainedModel) -> dict[str, str]:
    """Each model has its pairs."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def leaves_small_floats() -> bool:
    """They are cast as all others."""
    return False


def keeps_apart() -> bool:
    """They do."""
    return True


def trains_once_loaded(like: torch.Tensor) -> bool:
    """Every one of floating point does."""
    return like.is_floating_point()


def gives_memory() -> str:
    """It takes buffers that are not saved too."""
    return "_move_missing_keys_from_meta_to_device"


def give_own_kind(model: PreTrainedModel, missing: Sequence[str]) -> None:
    """transformers does."""


def unloaded(model: PreTrainedModel, given: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Under DeepSpeed, those that are not marked as loaded."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return {}
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: t for name, t in named if not getattr(t, "_is_hf_initialized", False)}


def computed(model: PreTrainedModel) -> list[torch.Tensor]:
    """None: they ran on the meta device."""
    return []
