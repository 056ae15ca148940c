"""Resizing the embeddings of any architecture, or saying why it cannot be done."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llmload.plugin import RequestError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from llmload.plugin import LoadContext

_COUNTS = ("vocab_size", "decoder_vocab_size")
# What transformers calls on the model to fill new rows. Marian does whatever `mean_resizing` says.
_INITIALISERS = (
    "_init_weights",
    "_init_added_embeddings_weights_with_mean",
    "_init_added_lm_head_weights_with_mean",
    "_init_added_lm_head_bias_with_mean",
)


def resize(model: PreTrainedModel, rows: int) -> None:
    """Give input and output embedding ``rows`` rows; new ones hold no values yet.

    transformers knows which tensors of an architecture go together, and makes new ones. Here their
    values move into the parameters and buffers that were there, so that ties, dtypes,
    ``requires_grad`` and whoever else holds them stay.

    :raises RequestError: transformers cannot resize this architecture, or changes more than sizes.
        (BART with untied embeddings: the decoder's would become the encoder's.)
    """
    before, old = named_tensors(model), input_embedding(model).weight.shape[0]
    try:
        with _uninitialised(model):
            model.resize_token_embeddings(rows, mean_resizing=False)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise _refusal(
            f"transformers cannot resize the embeddings of {type(model).__name__}: {error}"
        ) from error
    after = named_tensors(model)
    moved = sorted({name for group in _ties(before) ^ _ties(after) for name in group})
    if moved:
        raise _refusal(
            f"to resize the embeddings of {type(model).__name__}, transformers would drop or tie"
            f" {', '.join(moved)}"
        )
    for name, made in after.items():
        if made is not before[name]:
            before[name].data = made.detach().to(before[name].dtype)
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, before[name])
    head = model.get_output_embeddings()
    if isinstance(getattr(head, "out_features", None), int):
        head.out_features = rows  # transformers forgets it where the head is tied (Marian)
    _tell(model.config, old, rows)


@contextmanager
def _uninitialised(model: PreTrainedModel) -> Iterator[None]:
    """Let new modules of ``model`` keep uninitialised memory: no draw, no random state moved."""
    from llmload.plugin import installed_transformers

    for name in _INITIALISERS:
        setattr(model, name, lambda *args: None)
    try:
        with installed_transformers().no_init_weights():
            yield
    finally:
        for name in _INITIALISERS:
            delattr(model, name)


def _tell(config: PretrainedConfig, old: int, new: int) -> None:
    """Write the new number of rows where the old one stands, in sub-configs too.

    transformers writes it into the text config only: not into T5Gemma's encoder. Inkling cuts its
    logits to ``unpadded_vocab_size``, the number of rows without padding.
    """
    from transformers import PretrainedConfig

    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _tell(value, old, new)
        elif name == "unpadded_vocab_size" or (name in _COUNTS and value == old):
            setattr(config, name, new)


def vocabulary_tensors(
    model: PreTrainedModel, before: Mapping[str, torch.Size]
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yield name, tensor and dimension of what has one entry per token; tied tensors come once.

    These are the weights of input and output embedding, the head's bias, and whatever else changed
    its shape with them (``final_logits_bias`` of BART).

    :param before: the shape of each tensor before the resize, by name.
    """
    head = model.get_output_embeddings()
    weights = [model.get_input_embeddings().weight]
    weights += [getattr(head, name, None) for name in ("weight", "bias")]
    seen: set[int] = set()
    for name, tensor in named_tensors(model).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        sizes = enumerate(zip(before[name], tensor.shape, strict=True))
        resized = [dim for dim, (old, new) in sizes if old != new]
        if resized or any(tensor is weight for weight in weights):
            yield name, tensor, resized[0] if resized else 0


def vocabulary_parameters(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return the parameters of input and output embedding."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return [p for module in modules if module is not None for p in module.parameters()]


def named_tensors(model: nn.Module) -> dict[str, Any]:
    """Return all parameters and buffers, tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )


def _ties(tensors: Mapping[str, torch.Tensor]) -> set[tuple[str, ...]]:
    """Return the names of each tensor."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return {tuple(names) for names in groups.values()}


def _refusal(message: str) -> RequestError:
    fix = "Use a tokenizer that the embedding has rows for, and remove the section `embeddings`."
    return RequestError(message, fix=fix, where="embeddings")


def input_embedding(model: PreTrainedModel) -> Any:
    """Return the module that maps token ids to vectors.

    :raises RequestError: the architecture does not say which it is.
    """
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        name = type(model).__name__
        raise _refusal(f"{name} does not say which is its input embedding") from None


def refuse_quantised(model: PreTrainedModel) -> None:
    """Refuse an embedding whose rows cannot be read or written as numbers."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(module, "weight", None) for module in modules]
    for name, tensor in named_tensors(model).items():
        if any(tensor is weight for weight in weights) and not tensor.is_floating_point():
            raise _refusal(f"{name} is quantised to {tensor.dtype} and can get no new rows")


def refuse_misfit(
    ctx: LoadContext, config: Any, model: PreTrainedModel, before: Mapping[str, torch.Size]
) -> None:
    """Refuse a resize after which the model would not be what its own config builds.

    It could be saved, but not loaded again. So it is where the embedding has more rows than
    ``vocab_size`` (Mllama), or a table by token id stays as it was (DeepSeek-V4's hash router).
    What the resize changed is held against what ``vocab_size`` changes in a model built afresh.

    :param config: the config before the resize.
    """
    small, large = _built_shapes(ctx, config), _built_shapes(ctx, model.config)
    for name, tensor in named_tensors(model).items():
        if before[name] == tensor.shape and small.get(name) == large.get(name):
            continue
        if tensor.shape != large.get(name):
            raise _refusal(
                f"transformers leaves {name} of {type(model).__name__} at {list(tensor.shape)},"
                f" where its resized config asks for {list(large.get(name, ()))}"
            )


def _built_shapes(ctx: LoadContext, config: Any) -> dict[str, torch.Size]:
    config = copy.deepcopy(config)
    # The id of a new pad token lies beyond the table as it was; no shape needs it.
    config.get_text_config().pad_token_id = 0
    built = named_tensors(ctx.blank_of(config))
    return {name: tensor.shape for name, tensor in built.items()}
