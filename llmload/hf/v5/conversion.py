"""transformers 5's mapping and conversion of checkpoint keys, run with our values and placement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from llmload.hf.bars import is_first_rank, track
from llmload.hf.v5.conversion_rules import rules_of
from llmload.hf.v5.lazy_tensors import View
from llmload.hf.v5.receiving import Handover, Receive

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmload.checkpoint.contents import Checkpoint


def leave_alone(
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


def place_by_name(
    model: PreTrainedModel, views: Mapping[str, View], receive: Receive, names: set[str]
) -> Any:
    """What :func:`convert` does where there is nothing to convert."""
    from transformers.core_model_loading import dot_natural_key, set_param_for_module
    from transformers.utils.loading_report import LoadStateDictInfo

    info = LoadStateDictInfo(names, set(), set(), [], {}, set())
    handover = Handover(receive)
    for name in track(sorted(views, key=dot_natural_key), "Loading weights"):
        placed = receive(name, {name: views[name].plain()})
        set_param_for_module(model, name, placed[name], info, handover)
    return info


def convert(
    model: PreTrainedModel, values: Mapping[str, Any], receive: Receive, device: str
) -> Any:
    """Rename, convert and hand over every value; returns transformers' account of what it found."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    config = LoadStateDictConfig(
        # Where transformers would put what it reads. The placement decides on devices itself.
        device_map={"": device},
        dtype=None,  # nothing is cast before the placement has it
        hf_quantizer=Handover(receive),
        weight_mapping=rules_of(model),
    )
    with nullcontext() if is_first_rank() else no_progress_bar():
        info, _ = convert_and_load_state_dict_in_model(model, values, config)
    return info


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers from showing a bar for what takes no time."""
    from transformers.utils import logging

    before = logging.set_tqdm_hook(lambda factory, args, options: args[0])
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
