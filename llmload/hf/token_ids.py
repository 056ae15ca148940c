"""Token ids that the configs of a model name, and the rows that its embeddings have for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from llmload.errors import Problem

if TYPE_CHECKING:
    from torch import nn
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

_PADDING: Final = "pad_token_id"
_ATTRIBUTES: Final = (
    _PADDING,
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "bad_words_ids",
)
"""What begins, ends, pads and steers texts. Markers of images and sounds are not among them: models
replace those before they look up a row."""
_GENERATION: Final = "generation_config"


def without_rows(
    model: nn.Module,
    config: PretrainedConfig,
    generation: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Iterator[Problem]:
    """Warn of token ids that no embedding of the finished model has a row for.

    :param model: as it came out of the rehearsal.
    :param config: that it was built of.
    :param generation: that the folder holds.
    :param tokenizer: whose ids take the place of what the configs say.
    """
    finished: Any = getattr(model, "config", None)
    if not hasattr(finished, "attribute_map"):  # some plugin's own model
        return
    padded = dict(_from_the_end(model, config))
    yield from padded.values()
    text = finished.get_text_config()
    for place, holder in _parts(finished, "config"):
        seen_to = [*_aligned(holder, tokenizer)] if holder is text else []
        seen_to += [_PADDING] if place in padded else []
        yield from _problems(place, holder, _rows(model, holder), seen_to)
    if generation is not None:
        rows = _rows(model, finished.get_text_config(decoder=True))
        yield from _problems(_GENERATION, generation, rows, [*_aligned(None, tokenizer)])


def as_padding(config: PretrainedConfig) -> str | None:
    """Return what a spec can say of a padding id beyond the rows, with which nothing is built."""
    for place, holder in _parts(config, "config"):
        padding, rows = getattr(holder, _PADDING, None), getattr(holder, "vocab_size", None)
        if isinstance(padding, int) and isinstance(rows, int) and padding >= rows:
            return _written(place, [_PADDING])
    return None


def _from_the_end(model: nn.Module, config: PretrainedConfig) -> Iterator[tuple[str, Problem]]:
    """Yield places and warnings of negative ids of padding that embeddings were built with."""
    from torch import nn

    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    padding_rows = {table.padding_idx for table in tables}
    for place, holder in _parts(config, "config"):
        padding, rows = getattr(holder, _PADDING, None), getattr(holder, "vocab_size", None)
        if not (isinstance(padding, int) and isinstance(rows, int) and padding < 0):
            continue
        if (row := rows + padding) in padding_rows:
            problem = Problem(
                where=place,
                severity="warning",
                message=f"the model is built with `{_PADDING}: {padding}`, which torch takes for"
                f" row {row} of {rows}: no training will change that one",
                fix=f"Write `{_written(place, [_PADDING])}`, or the id of the padding.",
            )
            yield place, problem


def _aligned(holder: Any, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """Yield the attributes that get the tokenizer's id in place of their own.

    Of several ids that end a text, and of that of ``generation_config``, none is taken away.

    :param holder: the config of the text; None for ``generation_config``.
    """
    for name in (_PADDING, "bos_token_id", "eos_token_id"):
        ends = name == "eos_token_id"
        kept = ends and (holder is None or isinstance(getattr(holder, name, None), list))
        if getattr(tokenizer, name, None) is not None and not kept:
            yield name


def _problems(
    place: str, holder: Any, rows: int | None, seen_to: Iterable[str]
) -> Iterator[Problem]:
    asked = [name for name in _ATTRIBUTES if name not in seen_to]
    values = {name: getattr(holder, name, None) for name in asked}
    wrong = {
        name: value
        for name, value in values.items()
        if rows is not None and any(not 0 <= number < rows for number in _numbers(value))
    }
    if not wrong:
        return
    found = ", ".join(f"`{name}: {value}`" for name, value in wrong.items())
    mended = f"Mend {_GENERATION}.json."
    yield Problem(
        where=place,
        severity="warning",
        message=f"the embedding has {rows} rows, and none for {found}",
        fix=mended
        if place == _GENERATION
        else f"Write `{_written(place, wrong)}`, or the right ids.",
    )


def _written(place: str, names: Iterable[str]) -> str:
    """Return how a spec sets attributes of a part of the config to nothing."""
    text = ", ".join(f"{name}: null" for name in names)
    for part in reversed(place.split(".")):
        text = f"{part}: {{{text}}}"
    return text


def _parts(config: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield a config and those that it is made of, with their places."""
    yield place, config
    for name, value in vars(config).items():
        if hasattr(value, "attribute_map"):
            yield from _parts(value, f"{place}.{name}")


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _numbers(each)


def _rows(model: nn.Module, holder: Any) -> int | None:
    """Return how many rows there are for the ids of a config; None where it speaks of no text."""
    counted = getattr(holder, "vocab_size", None)
    if not isinstance(counted, int):  # an outer config, of ids of its text
        text = holder.get_text_config(decoder=True)
        return None if text is holder else _rows(model, text)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if type(config) is type(holder) and config.vocab_size == counted:
            return max(counted, _embedded(module))
    return counted


def _embedded(model: Any) -> int:
    """Return the rows of a model's input embedding, or of its largest where that is several."""
    from torch import nn

    try:
        rows = model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):
        tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
        rows = max((table.num_embeddings for table in tables), default=0)
    return int(rows)
