"""Loading by transformers 5's own key mapping and conversions, with our reading and placement.

``from_pretrained`` renames and converts checkpoint keys with
``convert_and_load_state_dict_in_model``, which takes any object that can be indexed for a tensor
and gives every finished tensor to a "quantiser" if there is one. We come in at these two ends: the
values are views of mapped files, the quantiser is the placement. What that function does in between
and what surrounds it in ``from_pretrained`` is private: :mod:`llmload.hf.v5.relied_on` says where
it differs from 5.23.0, which this was written against.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmload.checkpoint.accounting import Accounting, is_parameter
from llmload.checkpoint.placement import Plain
from llmload.checkpoint.placer import Placer
from llmload.hf.v5.conversion import convert, leave_alone, no_progress_bar, place_by_name
from llmload.hf.v5.conversion_rules import rules_of
from llmload.hf.v5.lazy_tensors import Outline, Taken, View, as_stored, assembled
from llmload.hf.v5.receiving import AbortError, Dtypes, Receiver
from llmload.spec.values import dtype_name

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmload.checkpoint.assembled import Assembled
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
    """Module names and their devices, ``auto`` and a ``torch.device`` context resolved.

    Which names the config ties, the model itself says: it need not be ``tied``.
    """
    from transformers.integrations.accelerate import _get_device_map, check_and_set_device_map

    checked = check_and_set_device_map(requested)
    most = None if max_memory is None else dict(max_memory)  # which is written to
    return None if checked is None else _get_device_map(model, checked, most, None)


def account(model: PreTrainedModel, checkpoint: Checkpoint, *, tied: bool = False) -> Accounting:
    """Run transformers' mapping and conversion over the checkpoint's shapes.

    Which names the config ties, the model itself says: it need not be ``tied``.
    """
    from transformers.utils.loading_report import LoadStateDictInfo

    state = model.state_dict()
    found: dict[str, torch.Tensor] = {}

    taken: Taken = []
    unchanged: dict[str, TensorInfo] = {}
    joined: dict[str, Assembled] = {}
    computed: list[TensorInfo] = []

    def receive(first: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found.update(values)
        # Three kinds, in the order of what they cost: a tensor of the file, several of them side by
        # side, and what is computed, for which they must be read whole.
        infos = as_stored(taken, values)
        if infos is not None:
            unchanged.update(infos)
        elif (made := assembled(taken, values)) is not None:
            joined.update(made)
        else:
            computed.extend(info for info, _ in taken)
        taken.clear()
        return {}

    def fits(name: str, value: torch.Tensor) -> bool:
        # Integers for a parameter of floating point are codes of a quantisation, which a cast would
        # take for values.
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
    # One of its names in the file is enough for a tied weight.
    for group in _ties(model):
        if not group <= absent:
            absent -= group
    info.missing_keys = set(absent)
    # Takes out what the class lets be missing or be there; that is excused below, not forgotten.
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
    return f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"


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
    device_map: DeviceMap | None,
    name_or_path: str,
) -> list[str]:
    """Place every weight the checkpoint has, initialise the others, tie what is tied.

    Returns the names that were initialised. Whatever reading or the placement raises comes out as
    it is.
    """
    from transformers.integrations.accelerate import expand_device_map
    from transformers.modeling_utils import LoadStateDictConfig, caching_allocator_warmup

    state = model.state_dict()
    devices = expand_device_map(device_map, list(state))
    if isinstance(placement, Plain):  # another may need far less
        caching_allocator_warmup(model, devices, None)
    taken: Taken = []
    computed = {info.name for info in accounting.computed}
    views = {
        info.name: View(info, taken, files, computed=info.name in computed)
        for info in files.checkpoint.tensors.values()
    }
    with Placer(model, state, files, placement, proof, devices) as placer:
        dtypes = Dtypes(model._get_dtype_plan(dtype), state)
        receiver = Receiver(placer, dtypes, taken)
        try:
            if accounting.rules is not None:
                info = place_by_name(model, views, receiver, set(state))
                model._weight_conversions = [r for r in accounting.rules if r.was_used()]
            else:
                info = convert(model, views, receiver, "cpu")
        except AbortError as abort:
            raise abort.cause from None
        placer.finish()
    # Read while somebody wrote to the files, the values may be of two versions.
    files.check()
    finishing = LoadStateDictConfig(
        pretrained_model_name_or_path=name_or_path, device_map=device_map
    )
    # Moves what is missing off the meta device, initialises it, ties what is tied.
    model._finalize_model_loading(model, finishing, info)
    placement.finish(model)
    return sorted(info.missing_keys)


def finish(
    model: PreTrainedModel,
    folder: Path,
    device_map: DeviceMap | None,
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
