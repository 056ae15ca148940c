"""The spec key ``tokenizer``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmload.builtin.tokenizer.spellings import SPELLINGS
from llmload.plugin import InvalidValueError, Section


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

    spellings = SPELLINGS

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
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """A Jinja template, the path of a file that holds one, or a folder or hub id whose tokenizer
    has one; null keeps."""
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
