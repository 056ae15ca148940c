"""Loading by transformers 4.51.3's own mapping of keys, with our reading and placement.

That version only renames keys, it converts nothing, and it has no place to come in: reading and
placement are one function. So the body of its ``_load_pretrained_model`` is gone through here with
its own helpers, and only that function is ours. Buffers have their values from the constructor and
are not on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmload.checkpoint.accounting import Accounting, is_parameter
from llmload.checkpoint.dtypes import torch_dtype
from llmload.checkpoint.placer import Placer
from llmload.errors import CheckpointError
from llmload.hf.bars import track
from llmload.hf.v4_51 import building
from llmload.spec.values import dtype_name

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmload.checkpoint.contents import Checkpoint
    from llmload.checkpoint.header import TensorInfo
    from llmload.checkpoint.mapped import MappedCheckpoint
    from llmload.checkpoint.placement import Placement
    from llmload.checkpoint.proof import Proof
    from llmload.hf.interface import DeviceMap


def resolve_device_map(
    model: PreTrainedModel,
    requested: Any,
    max_memory: Mapping[int | str, int | str] | None = None,
    *,
    tied: bool = True,
) -> DeviceMap | None:
    """Module names and their devices, ``auto`` and the like resolved."""
    import torch
    from transformers.modeling_utils import _get_device_map

    if isinstance(requested, int):
        requested = {"": requested}
    elif isinstance(requested, str) and requested not in _BALANCED:
        requested = {"": torch.device(requested)}
    dtype = model.config.torch_dtype
    most = None if max_memory is None else dict(max_memory)  # which is written to
    with nullcontext() if tied else building.tied(model):
        return _get_device_map(  # type: ignore[no-any-return]
            model, requested, most, None, dtype, _float32_pattern(model, dtype)
        )


_BALANCED = ("auto", "balanced", "balanced_low_0", "sequential")


def _float32_pattern(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    import torch

    if model._keep_in_fp32_modules is None or dtype != torch.float16:
        return None
    modules = "|".join(rf"((^|\.){module}($|\.))" for module in model._keep_in_fp32_modules)
    return re.compile(modules)


class _Keys:
    """Which name in the model each checkpoint key has, and what is left over on either side."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        from transformers.modeling_utils import _find_missing_and_unexpected_keys

        stored = list(checkpoint.names)
        # from_pretrained looks for the prefix in what the class's own old spellings become.
        renamed = list(model._get_key_renaming_mapping(stored, None, False, False).values())
        prefix = model.base_model_prefix
        has_prefix = bool(prefix) and any(key.startswith(prefix) for key in renamed)
        expects_prefix = bool(prefix) and hasattr(model, prefix)
        from_task = has_prefix and not expects_prefix
        from_base = expects_prefix and not has_prefix
        self.names: dict[str, str] = model._get_key_renaming_mapping(
            stored, None, from_task, from_base
        )
        self.missing, self.unexpected = _find_missing_and_unexpected_keys(
            type(model), model, renamed, list(self.names.values()), from_task, None, None
        )


def account(model: PreTrainedModel, checkpoint: Checkpoint, *, tied: bool = False) -> Accounting:
    """Hold the checkpoint's names, dtypes and shapes against the model's.

    A weight whose tie, if there is one, does not show yet would be called missing: a model that is
    not ``tied`` is tied meanwhile.
    """
    with nullcontext() if tied else building.tied(model):
        return _account(model, checkpoint)


def _account(model: PreTrainedModel, checkpoint: Checkpoint) -> Accounting:
    keys = _Keys(model, checkpoint)
    state = model.state_dict()
    mismatched = []
    for info in checkpoint.tensors.values():
        name = keys.names.get(info.name, "")
        stored = torch_dtype(info.dtype)
        if name not in state or stored is None:
            continue
        expected = state[name]
        integers = expected.is_floating_point() and not stored.is_floating_point
        if info.shape != expected.shape or (integers and is_parameter(model, name)):
            mismatched.append(
                (name, _outline(stored, info.shape), _outline(expected.dtype, expected.shape))
            )
    return Accounting(
        missing=tuple(keys.missing),
        excused=tuple(_excused(model, state.keys() - keys.names.values() - {*keys.missing})),
        unexpected=tuple(keys.unexpected),
        mismatched=tuple(sorted(mismatched)),
        failed={},
        as_stored={
            keys.names[info.name]: info
            for info in checkpoint.tensors.values()
            if keys.names.get(info.name) in state
        },
        assembled={},
        computed=(),
        rules=None,
    )


def _excused(model: PreTrainedModel, absent: Iterable[str]) -> list[str]:
    """The absent names that the class lets be missing, but for those that a tie will fill."""
    patterns = model._keys_to_ignore_on_load_missing or ()
    tied = set(model._tied_weights_keys or ())
    return sorted(
        name
        for name in absent
        if name not in tied and any(re.search(pattern, name) for pattern in patterns)
    )


def _outline(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{dtype_name(dtype)} {tuple(shape)}"


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Names of the parameters that stay float32 in a model of that dtype."""
    pattern = _float32_pattern(model, dtype)
    if pattern is None:
        return set()
    return {name for name, _ in model.named_parameters() if pattern.search(name)}


def final_dtypes(
    model: PreTrainedModel, accounting: Accounting, dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """The dtype that each parameter and buffer will have, by name."""
    import torch
    from transformers.modeling_utils import _infer_parameter_dtype

    found = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    kept = _float32_pattern(model, dtype)
    for name, info in accounting.as_stored.items():
        value = torch.empty((), dtype=torch_dtype(info.dtype), device="meta")
        found[name] = _infer_parameter_dtype(model, name, value, kept, None)[1] or value.dtype
    return found


def fill(
    model: PreTrainedModel,
    files: MappedCheckpoint,
    placement: Placement,
    proof: Proof,
    accounting: Accounting,
    *,
    dtype: torch.dtype,
    device_map: DeviceMap | None,
    name_or_path: str,
) -> list[str]:
    """Initialise what the checkpoint lacks, place every weight it has, tie what is tied.

    Returns the names that were initialised.
    """
    import torch
    from torch import nn
    from transformers.modeling_utils import _infer_parameter_dtype

    stored = accounting.as_stored
    ties = _ties(model)
    _refuse_contradictions(files, ties, stored)
    _initialise(model, accounting, dtype)
    kept = _float32_pattern(model, dtype)
    for name in kept_in_float32(model, dtype):
        parameter = model.get_parameter(name)
        # Those that were initialised too: they had the default dtype.
        parameter.data = parameter.data.to(torch.float32)
    state = model.state_dict()
    devices = _devices(list(state), device_map)
    with Placer(model, state, files, placement, proof, devices) as placer:
        for name, info in track(stored.items(), "Loading weights"):
            value = files.unread(info)
            _, cast = _infer_parameter_dtype(model, name, value, kept, None)
            placed = placer.place(name, cast or value.dtype, value, info)
            # A tied name that the file lacks gets the same object; one that it has is placed in its
            # turn, and `tie_weights` makes one of the two.
            for alias in (name, *(ties.get(name, set()) - stored.keys())):
                path, _, attribute = alias.rpartition(".")
                module = placer.modules[path]
                if attribute in module._parameters and not isinstance(placed, nn.Parameter):
                    like = getattr(module, attribute)
                    placed = nn.Parameter(placed, requires_grad=like.requires_grad)
                setattr(module, attribute, placed)
        placer.finish()
    files.check()
    model.tie_weights()
    placement.finish(model)
    return list(accounting.missing)


def _initialise(model: PreTrainedModel, accounting: Accounting, dtype: torch.dtype) -> None:
    """Give values to what the checkpoint lacks, and mark every module as initialised."""
    everything = accounting.as_stored.keys() >= model.state_dict().keys()
    if everything and all(map(building.is_of_a_library, model.modules())):
        # That transformers also finds out, with a state dict of each module, unless it is told that
        # sizes may differ.
        for module in model.modules():
            module._is_hf_initialized = True
        model._initialize_missing_keys(list(accounting.as_stored), True, False)
        return
    missing, unexpected = list(accounting.missing), list(accounting.unexpected)
    model._move_missing_keys_from_meta_to_cpu(missing, unexpected, dtype, None)
    model._initialize_missing_keys(list(accounting.as_stored), False, False)


def _ties(model: PreTrainedModel) -> dict[str, set[str]]:
    """Each tied parameter's name -> all names of the same parameter."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _refuse_contradictions(
    files: MappedCheckpoint, ties: Mapping[str, set[str]], stored: Mapping[str, TensorInfo]
) -> None:
    """Raise where weights that the config ties are stored with different values.

    ``from_pretrained`` of this version keeps the one and drops the other; 5.x unties them.
    """
    import torch

    for name, group in ties.items():
        for other in group:
            if not (name < other and name in stored and other in stored):
                continue
            pair = (stored[name], stored[other])
            if not torch.equal(*(files.tensor(info) for info in pair)):
                raise CheckpointError(
                    f"the config ties {name!r} and {other!r}, but the checkpoint has different"
                    " values for them",
                    fix="Set `tie_word_embeddings` to false in config.json.",
                )
            for info in pair:
                # They were read to be compared only.
                files.drop(info)


def _devices(names: list[str], device_map: DeviceMap | None) -> dict[str, Any]:
    """Each name's device: by the entry of the device map that transformers' search finds first."""
    if device_map is None:
        return dict.fromkeys(names, "cpu")
    entries = re.compile("|".join(re.escape(entry) for entry in sorted(device_map, reverse=True)))
    matches = {name: entries.search(name) for name in names}
    return {name: device_map[match.group()] for name, match in matches.items() if match}


def finish(
    model: PreTrainedModel,
    folder: Path,
    device_map: DeviceMap | None,
    *,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Do what ``from_pretrained`` does last: eval mode, generation config, hooks across devices."""
    from accelerate import dispatch_model
    from transformers import GenerationConfig

    model.eval()
    if model.can_generate():
        with suppress(OSError):  # there is none: the one made from the config stays
            model.generation_config = GenerationConfig.from_pretrained(
                str(folder), local_files_only=True
            )
    if device_map is not None:
        dispatch_model(model, device_map=device_map, skip_keys=model._skip_keys_device_placement)
    return model
