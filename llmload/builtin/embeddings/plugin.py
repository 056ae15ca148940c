"""Embeddings as large as the tokenizer needs, and a first value for every new row."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llmload.builtin.embeddings.section import EmbeddingsSection, InitNew
from llmload.hookspecs import hookimpl
from llmload.plugin import Note, Problem

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmload.plugin import Forecast, LoadContext


_CHUNK = 8192


class EmbeddingsPlugin:
    """Resizes with transformers, then writes the new rows itself.

    What differs from ``resize_token_embeddings(mean_resizing=True)``: the mean is the mean, taken
    in float32 and then rounded to the parameter's dtype, where transformers draws around it with
    1e-9 of the rows' covariance; it leaves out rows that belong to no token, which are untrained;
    a new token whose row the checkpoint has to spare gets a value too; the process's random state
    does not move; parameters stay the objects that they were. The rows of all other tokens stay
    bit-equal, as with transformers.
    """

    name = "embeddings"
    stage = "model"
    Section = EmbeddingsSection
    provides = ("embeddings",)
    audits_rehearsal = True

    @hookimpl
    def check(self, ctx: LoadContext) -> Iterator[Note]:
        """Say how many rows there will be, and why."""
        rows = getattr(ctx.config.get_text_config(), "vocab_size", None)
        if rows is not None:
            yield Note(text=_explained(rows, ctx))

    @hookimpl
    def cost(self, ctx: LoadContext, forecast: Forecast) -> None:
        """Own up to what was resized."""
        for weight in forecast.weights.values():
            if weight.route == "resized" and not weight.by:
                weight.by, weight.why = self.name, "as many rows as the tokenizer needs"

    @hookimpl
    def post_load(self, ctx: LoadContext, model: PreTrainedModel) -> PreTrainedModel:
        """Resize the embeddings and initialise the rows of new tokens."""
        from llmload.builtin.embeddings.resizing import input_embedding, vocabulary_parameters
        from llmload.plugin import partitions

        section = ctx.section(EmbeddingsSection)
        rows = partitions.shape(input_embedding(model).weight)[0]
        size = target_rows(rows, ctx.tokenizer, section)
        new = {token_id for token_id in ctx.new_tokens.values() if token_id < rows}
        new.update(range(rows, size))
        changed: list[str] = []
        if new or size != rows:
            with partitions.whole(vocabulary_parameters(model)):
                changed = self._change(ctx, model, rows, size, sorted(new))
        facts = {"rows": [rows, size], "new_rows": sorted(new), "init_new": section.init_new}
        ctx.record(self.name, facts | {"changed": changed})
        return model

    def _change(
        self, ctx: LoadContext, model: PreTrainedModel, rows: int, size: int, new: list[int]
    ) -> list[str]:
        """Resize to ``size``, write the rows ``new``; return the names of the tensors concerned."""
        from llmload.builtin.embeddings import resizing

        section = ctx.section(EmbeddingsSection)
        resizing.refuse_quantised(model)
        before = {name: tensor.shape for name, tensor in resizing.named_tensors(model).items()}
        if size != rows:
            config = copy.deepcopy(model.config)
            resizing.resize(model, size)
            if ctx.rehearsing:
                resizing.refuse_misfit(ctx, config, model, before)
        known = _known(rows, ctx)
        changed = []
        for name, tensor, dim in resizing.vocabulary_tensors(model, before):
            changed.append(name)
            # The head of Mllama has fewer rows than its input embedding.
            fill = [row for row in new if row < tensor.shape[dim]]
            if fill and not ctx.rehearsing:
                trained = [row for row in known if row < tensor.shape[dim]]
                how = section.init_new
                initialise_rows(tensor, fill, trained, how, dim=dim, seed=section.seed)
        return changed

    @hookimpl
    def audit(self, ctx: LoadContext, model: Any) -> Iterator[Problem]:
        """Check that config, input and output embedding have the rows that were planned."""
        from llmload.plugin import partitions

        rows = ctx.facts[self.name]["rows"][1]
        found = {"the input embedding": partitions.shape(model.get_input_embeddings().weight)[0]}
        head = model.get_output_embeddings()
        if head is not None:
            found["the output embedding"] = partitions.shape(head.weight)[0]
        for what, size in found.items():
            if size != rows:
                yield Problem(
                    message=f"{what} has {size} rows, {rows} were planned",
                    fix="A plugin after `embeddings` changed it; report this to its makers.",
                )


def target_rows(
    rows: int, tokenizer: PreTrainedTokenizerBase | None, section: EmbeddingsSection
) -> int:
    """Return how many rows an embedding of ``rows`` is to have.

    Ids count and not ``len(tokenizer)``, which is too small where a vocabulary has gaps.
    """
    needed = _needed(tokenizer)
    size = needed if needed > rows or (section.allow_shrink and tokenizer is not None) else rows
    multiple = section.pad_to_multiple_of or 1
    return -(-size // multiple) * multiple


def _needed(tokenizer: PreTrainedTokenizerBase | None) -> int:
    return 0 if tokenizer is None else max(tokenizer.get_vocab().values()) + 1


def _known(rows: int, ctx: LoadContext) -> list[int]:
    """Return the rows that training has seen: those of the checkpoint's own tokens."""
    if ctx.tokenizer is None:
        return list(range(rows))
    used = set(ctx.tokenizer.get_vocab().values()) - set(ctx.new_tokens.values())
    return sorted(token_id for token_id in used if token_id < rows)


def _explained(rows: int, ctx: LoadContext) -> str:
    section = ctx.section(EmbeddingsSection)
    needed, size = _needed(ctx.tokenizer), target_rows(rows, ctx.tokenizer, section)
    text = f"{rows} rows for {needed} token ids"
    if size != rows:
        text += f", {'grown' if size > rows else 'cut'} to {size}"
    if needed < rows and not section.allow_shrink:
        text += "; none is cut without `allow_shrink: true`"
    new = len([i for i in ctx.new_tokens.values() if i < rows]) + max(size - rows, 0)
    return text + (f"; {new} are new ({section.init_new})" if new else "")


def initialise_rows(
    tensor: torch.Tensor,
    rows: Sequence[int],
    known: Sequence[int],
    how: InitNew,
    *,
    dim: int = 0,
    seed: int = 0,
) -> None:
    """Write the entries ``rows`` of ``tensor`` along ``dim``, in place, in its own dtype.

    Mean and standard deviation are those of the entries ``known``, column by column, in float32.
    Works on any tensor that is whole: under ZeRO-3, call it while the parameter is gathered.

    :param tensor: shape (..., vocabulary, ...), any floating dtype.
    :param seed: for ``normal``; drawn on the CPU, so that every device gets the same values.
    """
    import torch

    table = tensor.detach().movedim(dim, 0)
    index = torch.tensor(rows, device=tensor.device)
    if how == "zero":
        table[index] = 0
        return
    chunks = torch.split(torch.tensor(known, device=tensor.device), _CHUNK)
    mean = torch.zeros(table.shape[1:], device=tensor.device)
    for chunk in chunks:
        mean += table[chunk].float().sum(0) / len(known)
    if how == "mean":
        table[index] = mean.to(table.dtype)
        return
    variance = torch.zeros_like(mean)
    for chunk in chunks:
        variance += (table[chunk].float() - mean).square().sum(0) / len(known)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((len(rows), *mean.shape), generator=generator).to(tensor.device)
    table[index] = (mean + noise * variance.sqrt()).to(table.dtype)
