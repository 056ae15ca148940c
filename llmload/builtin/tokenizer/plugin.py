"""The tokenizer: loaded, adjusted as the spec says, and the model's token ids aligned with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from llmload.builtin.tokenizer import ids, files
from llmload.builtin.tokenizer.changes import change
from llmload.errors import Problem
from llmload.spec.refusals import InvalidValueError
from llmload.errors import Note
from llmload.hookspecs import hookimpl
from llmload.spec.loadspec import Section

if TYPE_CHECKING:
    from torch import nn

    from llmload.context.context import LoadContext

_SHOWN = 3


class AddedToken(Section):
    """One token to add, with the flags of ``tokenizers.AddedToken``."""

    content: Annotated[str, Field(min_length=1)]
    """The text of the token."""
    special: bool = False
    """Leave it out when decoding with ``skip_special_tokens``."""
    single_word: bool = False
    """Match whole words only."""
    lstrip: bool = False
    """Match the white space to its left too."""
    rstrip: bool = False
    """Match the white space to its right too."""
    normalized: bool | None = None
    """Match in normalised text; null: unless the token is special."""

    def flags(self) -> dict[str, bool]:
        """Return all but the text, as keyword arguments of ``tokenizers.AddedToken``."""
        return self.model_dump(exclude={"content"}, exclude_none=True)


class SpecialTokens(Section):
    """Special tokens by their names in transformers, added to the vocabulary where not in it."""

    bos_token: str | None = None
    """Begins a text."""
    eos_token: str | None = None
    """Ends a text."""
    unk_token: str | None = None
    """Stands for what is not in the vocabulary."""
    sep_token: str | None = None
    """Separates two texts."""
    cls_token: str | None = None
    """Holds the summary of a text."""
    mask_token: str | None = None
    """Stands for a hidden token."""
    additional_special_tokens: tuple[str, ...] = ()
    """Further ones; those that the tokenizer has already stay special."""


class TokenizerSection(Section):
    """Which tokenizer, and what to change in it. Without a key, the tokenizer stays as it is."""

    name_or_path: Annotated[str, Field(min_length=1)] | None = None
    """Folder or hub id of the tokenizer; null: the model's own."""
    revision: str | None = None
    """Branch, tag or commit, where ``name_or_path`` is a hub id."""
    use_fast: bool = True
    """Prefer the tokenizer written in Rust. transformers 5 has one implementation per tokenizer."""
    pad_token: Annotated[str, Field(min_length=1)] | None = None
    """``eos``, ``unk``, or a token of the vocabulary or of ``add_tokens``; null keeps."""
    overwrite_pad: bool = False
    """Let ``pad_token`` replace another pad token that the tokenizer already has."""
    keep_pad: bool = False
    """Keep the pad token that the tokenizer already has: ``pad_token`` is for where it has none."""
    padding_side: Literal["left", "right"] | None = None
    """Side on which padding goes; null keeps."""
    truncation_side: Literal["left", "right"] | None = None
    """Side on which a long text is cut; null keeps."""
    model_max_length: Annotated[int, Field(gt=0)] | None = None
    """Number of tokens beyond which a text counts as long; null keeps."""
    add_tokens: tuple[Annotated[str, Field(min_length=1)] | AddedToken, ...] = ()
    """Tokens to add at the end of the vocabulary, unless they are in it."""
    add_special_tokens: SpecialTokens = SpecialTokens()
    """Special tokens to set, by name."""
    chat_template: str | None = None
    """A Jinja template, or the path of a ``.jinja`` file; null keeps."""
    add_bos_token: bool | None = None
    """Begin every text with the bos token; null keeps."""
    add_eos_token: bool | None = None
    """End every text with the eos token; null keeps."""
    eos_config_fields: tuple[Annotated[str, Field(pattern=r"^[a-z]\w*_id$")], ...] = ()
    """Further fields of the model's config that hold the id of the eos token, as DeepSpeed-Chat's
    ``end_token_id``."""

    @model_validator(mode="after")
    def _one_way_with_a_pad_token(self) -> TokenizerSection:
        if self.keep_pad and self.overwrite_pad:
            raise InvalidValueError(
                "`keep_pad` and `overwrite_pad` contradict each other",
                fix="Keep one of them.",
            )
        return self


class TokenizerPlugin:
    """Loads the tokenizer while the plan is made; takes part in every load.

    A folder without tokenizer files gives none, unless the spec has the section ``tokenizer``.
    """

    name = "tokenizer"
    Section = TokenizerSection
    always_active = True
    rehearsed = False

    @hookimpl
    def check(self, ctx: LoadContext) -> Iterator[Note | Problem]:
        """Load the tokenizer, change it as asked, and set ``ctx.tokenizer``."""
        section = ctx.section(TokenizerSection)
        folder = files.locate(ctx, section)
        if not files.names(folder):
            if self.name in ctx.spec.sections:
                raise files.refusal(
                    "name_or_path",
                    f"the folder {str(folder)!r} holds no tokenizer files",
                    "Name a folder or hub id that holds some in `tokenizer.name_or_path`, or remove"
                    " the section `tokenizer`.",
                )
            yield Note(text="no tokenizer: the folder holds no tokenizer files")
            return
        tokenizer = files.load(folder, ctx, section)
        before = dict(tokenizer.get_vocab())
        ctx.tokenizer = tokenizer
        if not section.use_fast and tokenizer.is_fast:
            yield Problem(
                where="tokenizer.use_fast",
                severity="warning",
                message=f"`use_fast: false` was asked for, but {type(tokenizer).__name__} is all"
                " that the installed transformers has, and it is a fast one",
                fix="Remove `tokenizer.use_fast`.",
            )
        yield from change(tokenizer, section)
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

    def _misfits(self, ctx: LoadContext, model: nn.Module) -> Iterator[ids.Misfit]:
        fields = ctx.section(TokenizerSection).eos_config_fields
        assert ctx.tokenizer is not None  # the callers saw to it
        return ids.misfits(model, ctx.tokenizer, eos_config_fields=fields)


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
    if rows is None or "embeddings" in ctx.active or ctx.tokenizer is None:
        return
    needed = max(ctx.tokenizer.get_vocab().values()) + 1
    new = [token for token, token_id in ctx.new_tokens.items() if token_id < rows]
    if needed > rows:
        yield Problem(
            where="tokenizer",
            # The model's own tokenizer may well have ids that its texts never use.
            severity="error" if len(ctx.new_tokens) > len(new) else "warning",
            message=f"the tokenizer has ids up to {needed - 1}, the model's embedding has"
            f" {rows} rows",
            fix="Add the section `embeddings: {}`.",
        )
    elif new:
        yield Problem(
            where="tokenizer",
            severity="warning",
            message=f"the new tokens {_some(new)} have rows in the checkpoint that no training has"
            " touched",
            fix="Add the section `embeddings: {}` to initialise them.",
        )


def _summary(ctx: LoadContext) -> str:
    tokenizer = ctx.tokenizer
    assert tokenizer is not None  # check sets it first
    new = f", {_some(ctx.new_tokens)} new" if ctx.new_tokens else ""
    return (
        f"{type(tokenizer).__name__} with {len(tokenizer)} tokens{new}; pad token"
        f" {tokenizer.pad_token!r}, padding on the {tokenizer.padding_side}"
    )


def _some(tokens: Iterable[str]) -> str:
    shown = [repr(token) for token in tokens]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
