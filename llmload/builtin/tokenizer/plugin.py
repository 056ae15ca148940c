"""The tokenizer: loaded, adjusted as the spec says, and the model's token ids aligned with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from llmload.builtin.tokenizer.section import TokenizerSection
from llmload.hookspecs import hookimpl
from llmload.plugin import Note, Problem, RequestError, some

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from llmload.builtin.tokenizer.ids import Misfit
    from llmload.plugin import LoadContext

_IN_EVERY_TEXT = ("pad", "bos", "eos", "unk", "sep", "cls")
"""Special tokens that texts and configs get, whatever they say."""


class TokenizerPlugin:
    """Loads the tokenizer while the plan is made; takes part in every load.

    A folder without tokenizer files gives none, unless the spec has the section ``tokenizer``.
    """

    name = "tokenizer"
    stage = "tokens"
    Section = TokenizerSection
    always_active = True
    rehearsed = False

    @hookimpl
    def check(self, ctx: LoadContext) -> Iterator[Note | Problem]:
        """Load the tokenizer, change it as asked, and set ``ctx.tokenizer``."""
        from llmload.builtin.tokenizer import files

        section = ctx.section(TokenizerSection)
        folder = files.locate(ctx, section)
        if not files.names(folder):
            if self.name in ctx.spec.sections:
                raise RequestError(
                    f"the folder {str(folder)!r} holds no tokenizer files",
                    fix="Name a folder or hub id that holds some in `tokenizer.name_or_path`, or"
                    " remove the section `tokenizer`.",
                    where="tokenizer.name_or_path",
                )
            yield Note(text="no tokenizer: the folder holds no tokenizer files")
            return
        tokenizer = files.load(folder, ctx, section)
        if not section.use_fast and tokenizer.is_fast:
            yield Problem(
                where="tokenizer.use_fast",
                severity="warning",
                message=f"`use_fast: false` was asked for, but {type(tokenizer).__name__} is all"
                " that the installed transformers has, and it is a fast one",
                fix="Remove `tokenizer.use_fast`.",
            )
        with files.faults_refused(folder):
            yield from _prepare(ctx, section, folder, tokenizer)

    @hookimpl
    def post_load(self, ctx: LoadContext, model: nn.Module) -> nn.Module:
        """Align the special-token ids of the model's configs with the tokenizer."""
        if ctx.tokenizer is None:
            return model
        aligned = {}
        for misfit in self._misfits(ctx, model):
            setattr(misfit.holder, misfit.attribute, misfit.wanted)
            aligned[misfit.place] = [misfit.found, misfit.wanted]
        ctx.record(
            self.name,
            {
                "class": type(ctx.tokenizer).__name__,
                "tokens": len(ctx.tokenizer),
                "new_tokens": ctx.new_tokens,
                "pad_token": ctx.tokenizer.pad_token,
                "aligned": aligned,
            },
        )
        return model

    @hookimpl
    def audit(self, ctx: LoadContext, model: nn.Module) -> Iterator[Problem]:
        """Hold the finished model's configs against the tokenizer once more."""
        if ctx.tokenizer is None:
            return
        for misfit in self._misfits(ctx, model):
            yield Problem(
                message=f"{misfit.place} is {misfit.found}, the tokenizer asks for {misfit.wanted}",
                fix="A plugin after `tokenizer` changed it; report this to its makers.",
            )

    def _misfits(self, ctx: LoadContext, model: nn.Module) -> Iterator[Misfit]:
        from llmload.builtin.tokenizer import ids

        fields = ctx.section(TokenizerSection).eos_config_fields
        assert ctx.tokenizer is not None  # the callers saw to it
        return ids.misfits(model, ctx.tokenizer, eos_config_fields=fields)


def _prepare(
    ctx: LoadContext, section: TokenizerSection, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Note | Problem]:
    """Change the tokenizer as asked, set it and what goes with it, and hold it to the model."""
    from llmload.builtin.tokenizer import chat_template, files, processors
    from llmload.builtin.tokenizer.changes import change

    before = dict(tokenizer.get_vocab())
    ctx.tokenizer = tokenizer
    template = chat_template.find(section.chat_template, ctx)
    yield from change(tokenizer, section, template)
    ctx.processor, problem = processors.load(ctx, section, folder)
    if problem is not None:
        yield problem
    if ctx.processor is not None and template is not None:
        ctx.processor.chat_template = template
    trained = before
    if folder != ctx.folder and files.names(ctx.folder):
        trained = files.load(ctx.folder, ctx, section).get_vocab()
        yield from _compare(before, trained)
    known = set(trained.values())
    ctx.new_tokens = {
        token: token_id
        for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if token_id not in known
    }
    yield from _rows(ctx)
    yield Note(text=_summary(ctx))
    if ctx.processor is not None:
        yield Note(text=f"{type(ctx.processor).__name__} around it")


def _compare(vocabulary: Mapping[str, int], trained: Mapping[str, int]) -> Iterator[Problem]:
    """Warn of ids that mean another token in the tokenizer the model was trained with."""
    by_id = {token_id: token for token, token_id in trained.items()}
    other = [t for t, i in vocabulary.items() if by_id.get(i, t) != t]
    if other:
        token = min(other, key=vocabulary.__getitem__)
        token_id = vocabulary[token]
        yield Problem(
            where="tokenizer.name_or_path",
            severity="warning",
            message=f"{len(other)} of {len(vocabulary)} ids mean another token than in the model's"
            f" own tokenizer; id {token_id} is {token!r}, there {by_id[token_id]!r}",
            fix="Use the tokenizer that the model was trained with, unless you retrain embeddings.",
        )


def _rows(ctx: LoadContext) -> Iterator[Problem]:
    """Say where tokens have no row in the embedding, or an untrained one, and nobody sees to it."""
    rows = getattr(ctx.config.get_text_config(), "vocab_size", None)
    if rows is None or ctx.providing("embeddings") or ctx.tokenizer is None:
        return
    needed = max(ctx.tokenizer.get_vocab().values()) + 1
    new = [token for token, token_id in ctx.new_tokens.items() if token_id < rows]
    used = {
        f"{name} token {getattr(ctx.tokenizer, f'{name}_token')!r}": token_id
        for name in _IN_EVERY_TEXT
        if (token_id := getattr(ctx.tokenizer, f"{name}_token_id")) is not None
    }
    beyond = [f"the {token} has id {number}" for token, number in used.items() if number >= rows]
    if needed > rows:
        yield Problem(
            where="tokenizer",
            # The model's own tokenizer may well have ids that its texts never use.
            severity="error" if beyond or len(ctx.new_tokens) > len(new) else "warning",
            message=f"the tokenizer has ids up to {needed - 1}, the model's embedding has"
            f" {rows} rows" + (f": {', '.join(beyond)}" if beyond else ""),
            fix="Add the section `embeddings: {}`"
            + (", or name other tokens in `tokenizer.add_special_tokens`." if beyond else "."),
        )
    elif new:
        yield Problem(
            where="tokenizer",
            severity="warning",
            message=f"the new tokens {some(new)} have rows in the checkpoint that no training has"
            " touched",
            fix="Add the section `embeddings: {}` to initialise them.",
        )


def _summary(ctx: LoadContext) -> str:
    tokenizer = ctx.tokenizer
    assert tokenizer is not None  # check sets it first
    new = f", {some(ctx.new_tokens)} new" if ctx.new_tokens else ""
    return (
        f"{type(tokenizer).__name__} with {len(tokenizer)} tokens{new}; pad token"
        f" {tokenizer.pad_token!r}, padding on the {tokenizer.padding_side}"
    )
