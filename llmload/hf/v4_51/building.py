"""A model of transformers 4.51.3 without storage, as ``from_pretrained`` builds it before it reads.

Buffers have their values from the constructor and are not on the meta device.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Container, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from llmload.checkpoint.patching import replaced
from llmload.hf.v4_51.relied_on import unsuited
from llmload.model.torch_defaults import default_dtype

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


def blank(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    stored: Container[str] = (),
    asked: bool = True,
) -> PreTrainedModel:
    """The model with its parameters on the meta device, weights not tied but by the constructor.

    transformers freezes fixed positions (Marian's, which are never saved) when it initialises them:
    so they are frozen here, unless they are among the ``stored`` names.
    """
    import torch

    if unsuited() is None:
        model = _build(model_class, config, dtype, asked=asked)
    else:
        with default_dtype(dtype), no_init_weights(), torch.device("meta"):
            model = model_class(copy.deepcopy(config))
    unsaved = set(model_class._keys_to_ignore_on_save or ())
    for path, module in model.named_modules():
        name = f"{path}.weight"
        # transformers 4.51's sinusoidal embeddings, which have a method to fill them in.
        if hasattr(module, "_init_weight") and name in unsaved and name not in stored:
            module.weight.requires_grad_(False)
    return model


def built_under(
    context: AbstractContextManager[Any],
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    asked: bool,
) -> PreTrainedModel:
    """With the context in place of the meta device, to which each parameter would be moved."""
    lazy = _build(model_class, config, dtype, context, asked=asked)
    lazy.tie_weights()
    return lazy


def _build(
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
    from transformers.modeling_utils import no_init_weights

    with no_init_weights(), without_memory or _parameters_on_meta():
        return construct(model_class, config, dtype, asked=asked)


def construct(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    asked: bool = True,
) -> PreTrainedModel:
    """As for a model without storage, but for the meta device."""
    config = copy.deepcopy(config)
    parts = (getattr(config, name) for name in config.sub_configs) if asked else ()
    # Some constructors take the dtype of a part from its config, not torch's default.
    for part in (config, *parts):
        part.torch_dtype = dtype
    with default_dtype(dtype):
        choose = getattr(model_class, "_autoset_attn_implementation", None)  # 4.57 has none
        if choose is not None and not getattr(config, "_attn_implementation_autoset", False):
            config = choose(config, use_flash_attention_2=False, torch_dtype=dtype, device_map=None)
        return model_class(config)


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


def to_fill(blank: PreTrainedModel) -> PreTrainedModel:
    """Tie the model as ``from_pretrained`` does: by the config alone.

    It builds with ``init_empty_weights``, which takes apart what the constructor ties.
    """
    # Parameters that modules share are one object, and only the first keeps it.
    seen = set()
    for module in blank.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = _anew(parameter, parameter.data)
            seen.add(id(parameter))
    blank.tie_weights()
    return blank


def _anew(parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    """Another object like a parameter, over other data."""
    return type(parameter)(data, **vars(parameter), requires_grad=parameter.requires_grad)


def no_init_weights() -> AbstractContextManager[Any]:
    """transformers' own, where it was before 5.0."""
    from transformers.modeling_utils import no_init_weights

    found: AbstractContextManager[Any] = no_init_weights()
    return found


def is_post_initialised(model: PreTrainedModel) -> bool:
    """Loading does without."""
    return True


def adapters_left_alone() -> AbstractContextManager[None]:
    """Let ``from_pretrained`` find no adapter beside the weights."""
    from transformers import modeling_utils

    return replaced(modeling_utils, {"find_adapter_config_file": lambda *args, **options: None})


def tied_names(model: PreTrainedModel) -> set[str]:
    """All names of a tied weight but the first."""
    return set(ties(model))


def ties(model: PreTrainedModel) -> dict[str, str]:
    """What ``tie_weights`` ties: the lists of some classes name modules, or the embedding too."""
    untied = dict(model.named_parameters(remove_duplicate=False))
    groups: dict[int, list[str]] = {}
    with tied(model):
        for name, parameter in model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
    return {
        name: first
        for first, *others in groups.values()
        for name in others
        if untied.get(name) is not untied.get(first)  # else the constructor has tied them
    }


@contextmanager
def tied(model: PreTrainedModel) -> Iterator[None]:
    """Have a blank model's weights tied for the length of a block."""
    from llmload.model import reachable

    with reachable.kept(model):
        model.tie_weights()
        yield


def leaves_small_floats() -> bool:
    """Those of 8 bits are loaded as they are, whatever dtype the model has."""
    return True


def keeps_apart() -> bool:
    """One would be lost."""
    return False


def trains_once_loaded(like: torch.Tensor) -> bool:
    """It stays as the constructor made it."""
    return like.requires_grad


def gives_memory() -> str:
    """It takes parameters alone."""
    return "_move_missing_keys_from_meta_to_cpu"


def give_own_kind(model: PreTrainedModel, missing: Sequence[str]) -> None:
    """What is not of floating point gets memory here: transformers would give it that of floats."""
    import torch

    state = model.state_dict(keep_vars=True)
    for name in missing:
        value = state.get(name)
        if value is None or not value.is_meta or value.is_floating_point():
            continue
        path, _, attribute = name.rpartition(".")
        memory = torch.empty_like(value, device="cpu")
        setattr(model.get_submodule(path), attribute, _anew(value, memory))


def unloaded(model: PreTrainedModel, given: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Each buffer of a class that is no library's, and each parameter.

    Such a class may initialise them in the constructor, which ``no_init_weights`` has prevented:
    memory that a placement or DeepSpeed gave them holds nothing yet. The names that are loaded are
    given.
    """
    loaded = set(given[0]) if given else set()
    _give_memory_to_excused(model, loaded)
    found: dict[str, torch.Tensor] = dict(model.named_parameters())
    for path, module in model.named_modules():
        if not is_of_a_library(module):
            found |= {f"{path}.{n}".lstrip("."): b for n, b in module.named_buffers(recurse=False)}
    return {name: tensor for name, tensor in found.items() if name not in loaded}


def _give_memory_to_excused(model: PreTrainedModel, loaded: Set[str]) -> None:
    """Take off the meta device what the class lets be missing, where no tie fills it: transformers
    gives memory to what it calls missing alone."""
    import torch

    patterns = model._keys_to_ignore_on_load_missing or ()
    if not patterns:
        return
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for group in names.values():
        parameter = model.get_parameter(group[0])
        excused = any(re.search(pattern, group[0]) for pattern in patterns)
        tied = not {*group}.isdisjoint(model._tied_weights_keys or ())
        if excused and not tied and parameter.is_meta and loaded.isdisjoint(group):
            with_memory = _anew(parameter, torch.empty_like(parameter, device="cpu"))
            for path, _, attribute in (name.rpartition(".") for name in group):
                setattr(model.get_submodule(path), attribute, with_memory)


def computed(model: PreTrainedModel) -> list[torch.Tensor]:
    """Buffers, and plain attributes such as ``original_inv_freq``."""
    import torch

    return [
        value
        for module in filter(is_of_a_library, model.modules())
        for value in (*module._buffers.values(), *vars(module).values())
        if isinstance(value, torch.Tensor) and not value.is_meta
    ]


def is_of_a_library(module: nn.Module) -> bool:
    """Whether a module's class is torch's or transformers' own."""
    return type(module).__module__.partition(".")[0] in ("torch", "transformers")
