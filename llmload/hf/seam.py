"""Where transformers 5 hands over: its key mapping and conversions, our reading and placement.

``from_pretrained`` renames and converts checkpoint keys with
``convert_and_load_state_dict_in_model``, which takes any object that can be indexed for a tensor
and gives every finished tensor to a "quantiser" if there is one. We come in at these two ends: the
values are views of mapped files, the quantiser is the placement. What that function does in between
and what surrounds it in ``from_pretrained`` is private: :func:`unsuited` says where it differs from
5.23.0, which this was written against.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmload.checkpoint.accounting import Accounting, is_parameter
from llmload.checkpoint.placement import Plain
from llmload.checkpoint.placing import Placer
from llmload.hf.converting import convert, leave_alone, no_progress_bar, place_by_name
from llmload.hf.handover import (
    AbortError,
    Dtypes,
    Outline,
    Receiver,
    Taken,
    View,
    as_stored,
    assembled,
)
from llmload.hf.rules import rules_of
from llmload.hf.signatures import first_difference

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmload.checkpoint.contents import Checkpoint
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


def unsuited() -> str | None:
    """The first private function of the installed transformers that is not as expected, or None."""
    return first_difference(_SIGNATURES, "5.23")


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
    alone = leave_alone(rules, model, checkpoint, state)
    if alone:
        receive("", {name: outline.plain() for name, outline in outlines.items()})
        info = LoadStateDictInfo(set(), set(), set(), [], {}, set())
    else:
        with no_progress_bar():
            info = convert(model, outlines, receive, "meta")
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

    plan = model._get_dtype_plan(dtype)
    if not plan:
        return set()
    dtypes = Dtypes(plan, model.state_dict())
    names = (name for name, _ in model.named_parameters())
    return {name for name in names if dtypes.of(name) == torch.float32}


def final_dtypes(
    model: PreTrainedModel, accounting: Accounting, dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """The dtype that each parameter and buffer will have, by name."""
    state = model.state_dict()
    dtypes = Dtypes(model._get_dtype_plan(dtype), state)
    return {name: dtypes.of(name) for name in state}


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
                info = place_by_name(model, views, receiver, set(placer.state))
                model._weight_conversions = [r for r in accounting.rules if r.was_used()]
            else:
                info = convert(model, views, receiver, "cpu")
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
