"""Whether a folder that was just written holds the model: every tensor, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmload.checkpoint import Checkpoint
from llmload.checkpoint.mapped import MappedCheckpoint
from llmload.errors import LlmloadError, LoadFailedError, some
from llmload.loading import pipeline
from llmload.saving import obstacles

if TYPE_CHECKING:
    import torch

    from llmload.host.registry import Registry

_KEPT = (
    "auto_class", "trust_remote_code", "strict", "attn_implementation", "local_files_only",
)  # fmt: skip
"""Keys of a spec that hold for what was saved of its model, too."""


def prove_model(
    model: Any, folder: Path, spec: Mapping[str, Any], registry: Registry, *, target: Path
) -> None:
    """Load a saved model from its own pages, and compare.

    :param folder: where it is until it has its name.
    :param spec: by which ``model`` was loaded.
    :param target: the folder's name, for messages.
    :raises LoadFailedError: a tensor differs, or it does not load.
    """
    if obstacles.is_quantised(model):
        _hold_files(folder, _quantised_state(model))
        return
    _hold_files(folder, model.state_dict())
    again = {"model": str(folder)} | {key: spec[key] for key in _KEPT if key in spec}
    try:
        saved = pipeline.load(again, registry=registry, prove=False).model.state_dict()
    except LlmloadError as error:
        said = str(error).replace(str(folder), str(target))
        raise LoadFailedError(f"what was written does not load again: {said}") from error
    # With parts in another dtype (the section `cast`) a load without it casts them.
    _hold(
        (name, value.to(saved[name].dtype), saved[name])
        for name, value in model.state_dict().items()
    )


def _quantised_state(model: Any) -> dict[str, torch.Tensor]:
    """Return codes and statistics by the names under which transformers saves them."""
    ask = getattr(model.hf_quantizer, "get_state_dict_and_metadata", None)
    state = ask(model)[0] if ask is not None else None
    return dict(state or model.state_dict())


def prove_adapter(model: Any, name: str, folder: Path, *, embeddings: bool | str) -> None:
    """Compare a saved adapter with what PEFT says that it is.

    :param embeddings: whether the embeddings were saved with it.
    :raises LoadFailedError: a tensor differs.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=embeddings)
    stored = _hold_files(folder / "adapter_model.safetensors", state)
    missing = state.keys() - stored
    if missing:
        raise LoadFailedError(f"tensors of the adapter were not saved: {some(sorted(missing))}")


def _hold_files(place: Path, state: Mapping[str, torch.Tensor]) -> set[str]:
    """Compare what was stored under a tensor's own name, and return the names.

    A tied tensor is stored once, and transformers may store some in the form of the model's first
    release: those are compared by a load.
    """
    checkpoint = Checkpoint.open(place)
    names = state.keys() & checkpoint.tensors.keys()
    with MappedCheckpoint(checkpoint) as files:
        _hold((name, state[name], files.tensor(checkpoint.tensors[name])) for name in sorted(names))
    return names


def _hold(pairs: Iterator[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
    wrong = [name for name, value, saved in pairs if not _same(value, saved)]
    if wrong:
        raise LoadFailedError(
            f"what was written is not what the model holds: {some(wrong)}",
            fix="Nothing is left of it. Report this, with the model's type and the versions.",
        )


def _same(value: torch.Tensor, saved: torch.Tensor) -> bool:
    """Compare bits: a NaN is the same as itself."""
    import torch

    if value.dtype != saved.dtype or value.shape != saved.shape:
        return False
    ours, theirs = (each.detach().cpu().contiguous().view(-1) for each in (value, saved))
    return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
