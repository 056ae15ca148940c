"""Where transformers 5 hands over: its key mapping and conversions, our reading and placement.

``from_pretrained`` renames and converts checkpoint keys with
``convert_and_load_state_dict_in_model``, which takes any object that can be indexed for a tensor
and gives every finished tensor to a "quantiser" if there is one. We come in at these two ends: the
values are views of mapped files, the quantiser is the placement. What that function does in between
and what surrounds it in ``from_pretrained`` is private: :func:`unsuited` says where it differs from
5.23.0, which this was written against.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmload.checkpoint.accounting import Accounting, is_parameter
from llmload.checkpoint.handover import (
    AbortError,
    Dtypes,
    Handover,
    Outline,
    Receive,
    Receiver,
    Taken,
    View,
    as_stored,
    assembled,
)
from llmload.checkpoint.placement import Plain
from llmload.checkpoint.placing import Placer
from llmload.checkpoint.replacing import replaced
from llmload.checkpoint.rules import rules_of
from llmload.checkpoint.signatures import first_difference

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from llmload.checkpoint.description import Checkpoint
    from llmload.checkpoint.header import TensorInfo
    from llmload.checkpoint.mapped import MappedCheckpoint
    from llmload.checkpoint.placement import Placement
    from llmload.checkpoint.proof import Proof

_SIGNATURES = {
    "core_model_loading:convert_and_load_state_dict_in_model": (
        "model state_dict load_config disk_offload_index"
    ),
    "core_model_loading:build_glob_alternation": "globs",
    "core_model_loading:dot_natural_key": "s",
    "core_model_loading:rename_source_key": (
        "source_key weight_renamings weight_converters base_model_prefix meta_state_dict reverse"
    ),
    "core_model_loading:spawn_materialize": (
        "thread_pool tensor device dtype sharding_op tensor_idx"
    ),
    "core_model_loading:set_param_for_module": (
        "model target_name param_value loading_info hf_quantizer"
    ),
    "conversion_mapping:_build_checkpoint_conversion_mapping": "",
    "conversion_mapping:get_checkpoint_conversion_mapping": "model_type",
    "conversion_mapping:get_model_conversion_mapping": "model key_mapping hf_quantizer add_legacy",
    "monkey_patching:patch_output_recorders": "model",
    "modeling_utils:_get_dtype": (
        "dtype checkpoint_files config sharded_metadata state_dict weights_only hf_quantizer"
    ),
    "modeling_utils:caching_allocator_warmup": "model expanded_device_map hf_quantizer",
    "modeling_utils:PreTrainedModel.get_init_context": (
        "dtype is_quantized _is_ds_init_called allow_all_kernels"
    ),
    "modeling_utils:PreTrainedModel._get_dtype_plan": "self dtype",
    "modeling_utils:PreTrainedModel._finalize_model_loading": "model load_config loading_info",
    "modeling_utils:PreTrainedModel._adjust_missing_and_unexpected_keys": "self loading_info",
    "modeling_utils:PreTrainedModel.set_use_kernels": "self use_kernels kernel_config mode",
    "generation:GenerationMixin.adjust_generation_fn": (
        "self generation_config from_auto_class from_pipeline pretrained_model_name_or_path "
        "cache_dir force_download proxies local_files_only token revision subfolder "
        "trust_remote_code kwargs"
    ),
    "integrations.accelerate:check_and_set_device_map": "device_map",
    "integrations.accelerate:_get_device_map": "model device_map max_memory hf_quantizer",
    "integrations.accelerate:expand_device_map": "device_map param_names",
    "integrations.accelerate:accelerate_dispatch": (
        "model hf_quantizer device_map offload_folder offload_index offload_buffers"
    ),
    "utils.logging:set_tqdm_hook": "hook",
    "utils.loading_report:LoadStateDictInfo": (
        "missing_keys unexpected_keys mismatched_keys error_msgs conversion_errors skipped_pp_keys"
    ),
}

_DRAWS = ("kaiming_uniform_", "normal_", "ones_", "uniform_", "xavier_uniform_", "zeros_")
"""What the constructors of torch's own modules initialise with."""


def unsuited() -> str | None:
    """The first private function of the installed transformers that is not as expected, or None."""
    return first_difference(_SIGNATURES, "5.23")


def build(
    model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """The model on the meta device, weights not tied, as ``from_pretrained`` builds it."""
    from transformers.modeling_utils import _get_dtype
    from transformers.monkey_patching import patch_output_recorders

    # Also sets the dtype in sub-configs, from which some heads take theirs.
    config, dtype = _get_dtype(dtype, None, copy.deepcopy(config), None, None, True, None)
    with ExitStack() as stack:
        for context in model_class.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        stack.enter_context(_nothing_drawn_on_meta())
        model = model_class(config)
        patch_output_recorders(model)
    return model


def _nothing_drawn_on_meta() -> AbstractContextManager[None]:
    """Pass over the first values of tensors that have none: a third of the time to build a model.

    ``transformers.initialization.no_init_weights`` is for all tensors, and returns none of them.
    """
    from torch.nn import init

    def passing_over(draw: Callable[..., Any]) -> Callable[..., Any]:
        def pass_over(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return tensor if tensor.is_meta else draw(tensor, *args, **kwargs)

        return pass_over

    return replaced(init, {name: passing_over(getattr(init, name)) for name in _DRAWS})


def resolve_device_map(
    model: PreTrainedModel, requested: Any
) -> dict[str, int | str | torch.device] | None:
    """Module names and their devices, ``auto`` and a ``torch.device`` context resolved."""
    from transformers.integrations.accelerate import _get_device_map, check_and_set_device_map

    checked = check_and_set_device_map(requested)
    return None if checked is None else _get_device_map(model, checked, None, None)


def rehearse(model: PreTrainedModel, checkpoint: Checkpoint) -> Accounting:
    """Run transformers' mapping and conversion over the checkpoint's shapes. Changes nothing."""
    from transformers.utils.loading_report import LoadStateDictInfo

    state = model.state_dict()
    found: dict[str, torch.Tensor] = {}

    taken: Taken = []
    unchanged: dict[str, TensorInfo] = {}
    joined: dict[str, int] = {}
    computed: list[TensorInfo] = []

    def receive(first: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found.update(values)
        infos = as_stored(taken, values)
        if infos is not None:
            unchanged.update(infos)
        elif assembled(taken, values) is not None:
            joined.update((name, value.nbytes) for name, value in values.items())
        else:
            computed.extend(info for info, _ in taken)
        taken.clear()
        return {}

    def fits(name: str, value: torch.Tensor) -> bool:
        integers = state[name].is_floating_point() and not value.is_floating_point()
        return value.shape == state[name].shape and not (integers and is_parameter(model, name))

    outlines = {info.name: Outline(info, taken) for info in checkpoint.tensors.values()}
    rules = rules_of(model)
    alone = _leave_alone(rules, model, checkpoint, state)
    if alone:
        receive("", {name: outline.plain() for name, outline in outlines.items()})
        info = LoadStateDictInfo(set(), set(), set(), [], {}, set())
    else:
        with _no_progress_bar():
            info = _convert(model, outlines, receive, "meta")
    absent = state.keys() - found.keys() - info.conversion_errors.keys()
    for tied in _ties(model):
        if not tied <= absent:
            absent -= tied
    info.missing_keys = set(absent)
    model._adjust_missing_and_unexpected_keys(info)
    return Accounting(
        missing=tuple(sorted(info.missing_keys)),
        excused=tuple(sorted(absent - info.missing_keys)),
        unexpected=tuple(sorted(info.unexpected_keys)),
        mismatched=tuple(
            (name, _outline(value), _outline(state[name]))
            for name, value in sorted(found.items())
            if name in state and not fits(name, value)
        ),
        failed=info.conversion_errors,
        as_stored=unchanged,
        assembled=joined,
        computed=tuple(computed),
        rules=tuple(rules) if alone else None,
    )


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Names of the parameters that stay float32 in a model of that dtype."""
    import torch

    dtypes = Dtypes(model._get_dtype_plan(dtype), model.state_dict())
    names = (name for name, _ in model.named_parameters())
    return {name for name in names if dtypes.of(name) == torch.float32}


def final_dtypes(
    model: PreTrainedModel, accounting: Accounting, dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """The dtype that each parameter and buffer will have, by name."""
    state = model.state_dict()
    dtypes = Dtypes(model._get_dtype_plan(dtype), state)
    return {name: dtypes.of(name) for name in state}


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from showing a bar for what takes no time."""
    from transformers.utils import logging

    before = logging.set_tqdm_hook(lambda factory, args, options: args[0])
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _outline(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _ties(model: PreTrainedModel) -> Iterator[set[str]]:
    groups: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(target)
    yield from groups.values()


def fill(
    model: PreTrainedModel,
    files: MappedCheckpoint,
    placement: Placement,
    proof: Proof,
    accounting: Accounting,
    *,
    dtype: torch.dtype,
    device_map: dict[str, Any] | None,
    name_or_path: str,
) -> list[str]:
    """Place every weight the checkpoint has, initialise the others, tie what is tied.

    Returns the names that were initialised. Whatever reading or the placement raises comes out as
    it is.
    """
    from transformers.integrations.accelerate import expand_device_map
    from transformers.modeling_utils import LoadStateDictConfig, caching_allocator_warmup

    devices = expand_device_map(device_map, list(model.state_dict()))
    if isinstance(placement, Plain):  # another may need far less
        caching_allocator_warmup(model, devices, None)
    taken: Taken = []
    views = {info.name: View(info, taken, files) for info in files.checkpoint.tensors.values()}
    with Placer(model, files, placement, proof, devices) as placer:
        dtypes = Dtypes(model._get_dtype_plan(dtype), placer.state)
        receiver = Receiver(placer, dtypes, taken)
        try:
            if accounting.rules is not None:
                info = _place_by_name(model, views, receiver, set(placer.state))
                model._weight_conversions = [r for r in accounting.rules if r.was_used()]
            else:
                info = _convert(model, views, receiver, "cpu")
        except AbortError as abort:
            raise abort.cause from None
        placer.finish()
    files.check()
    finishing = LoadStateDictConfig(
        pretrained_model_name_or_path=name_or_path, device_map=device_map
    )
    model._finalize_model_loading(model, finishing, info)
    placement.finish(model)
    return sorted(info.missing_keys)


def finish(
    model: PreTrainedModel,
    folder: Path,
    device_map: dict[str, Any] | None,
    *,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Do what ``from_pretrained`` does last: eval mode, generation config, hooks across devices."""
    from transformers.integrations.accelerate import accelerate_dispatch

    model.eval()
    model.set_use_kernels(False, None)
    if model.can_generate() and hasattr(model, "adjust_generation_fn"):
        model.adjust_generation_fn(
            generation_config=None,
            from_auto_class=False,
            from_pipeline=None,
            pretrained_model_name_or_path=str(folder),
            cache_dir=None,
            force_download=False,
            proxies=None,
            local_files_only=True,
            token=None,
            revision="main",
            subfolder="",
            trust_remote_code=trust_remote_code,
        )
    if device_map is not None and len(set(device_map.values())) > 1:
        accelerate_dispatch(model, None, device_map, None, None, False)
    return model


def _leave_alone(
    rules: Iterable[Any],
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    state: Mapping[str, torch.Tensor],
) -> bool:
    """Whether every key of the checkpoint is a name of the model that no rule changes or converts.

    Then there is no need to make a rule of each key, with a regular expression of its own, which
    for a model loaded as it is stored takes longer than everything else.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    return all(
        name in state
        and rename_source_key(name, renamings, converters, prefix, state) == (name, None)
        for name in checkpoint.tensors
    )


def _place_by_name(
    model: PreTrainedModel, views: Mapping[str, View], receive: Receive, names: set[str]
) -> Any:
    """What :func:`_convert` does where there is nothing to convert."""
    from transformers.core_model_loading import dot_natural_key, set_param_for_module
    from transformers.utils import logging
    from transformers.utils.loading_report import LoadStateDictInfo

    info = LoadStateDictInfo(names, set(), set(), [], {}, set())
    handover = Handover(receive)
    for name in logging.tqdm(sorted(views, key=dot_natural_key), desc="Loading weights"):
        placed = receive(name, {name: views[name].plain()})
        set_param_for_module(model, name, placed[name], info, handover)
    return info


def _convert(
    model: PreTrainedModel, values: Mapping[str, Any], receive: Receive, device: str
) -> Any:
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=None,  # nothing is cast before the placement has it
        hf_quantizer=Handover(receive),
        weight_mapping=rules_of(model),
    )
    info, _ = convert_and_load_state_dict_in_model(model, values, config)
    return info
