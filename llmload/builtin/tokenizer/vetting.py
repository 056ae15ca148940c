"""A tokenizer's files, held to the rules for files that nobody vouches for, before they are opened.

Tokens are held to what the model can embed: each takes microseconds, and a small file names
millions. So are their characters, of which the next may cost more than the one before.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llmload.builtin.tokenizer import serialized
from llmload.plugin import CheckpointError, RequestError, UntrustedFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmload.plugin import LoadContext

_CONFIGS: Final = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.json")
_ADDED: Final = "added_tokens.json"
_TEMPLATES: Final = "additional_chat_templates"
# What transformers may open for a tokenizer of whatever class.
_FILES: Final = ("*.json", "*.jinja", "*.txt", "*.model", "*.spm", "*.tiktoken", "tokenizer*")
_NOT_ITS_OWN: Final = (".safetensors", ".bin", ".index.json")
_VOCABULARIES: Final = ("tokenizer", "vocab", "merges", "tekken")
_VOCABULARY_KINDS: Final = (".model", ".spm", ".tiktoken")
_MAX_BYTES: Final = 64 * 2**20
"""Of a vocabulary; that of 262,144 words in all the world's scripts has half of it."""
_WORDS: Final = 50_000
"""Words and merges that a vocabulary may have beside four for each row of the embedding."""
_NAMED_WORDS: Final = 2**19
"""As many, where the spec itself names a tokenizer other than the model's."""
_ADDED_TOKENS: Final = 16_384
"""Added tokens, or as many as half of the embedding has rows: speech models have a codebook."""
_SPECIAL_TOKENS: Final = 8192
_TOKEN_CHARACTERS: Final = 128
"""Of one added token; runs of spaces are the longest, of 32."""
_USUAL_TOKEN: Final = 16
"""Bytes of an added token: all may cost together what as many as are allowed cost at this size."""
_PIECE_LENGTH: Final = 1000
"""Bytes of one piece."""
_USUAL_PIECE: Final = 16
"""Bytes of a piece; those of a hundred languages (XLM-R) have 11 on average."""
_GROWTH: Final = 10**6
"""Of a text on its way to ids; that of sentencepiece's normalizer alone is 50."""
_ENTRIES: Final = 1000
"""Files of a tokenizer, or templates beside it, each of which is opened; most have a dozen."""
_FIELDS: Final = 7
"""Keys that each added token has in ``tokenizer.json``."""
_PIECE_BYTES: Final = 8
"""The least that a piece takes in a binary vocabulary, beside its text."""


def vet(folder: Path, ctx: LoadContext) -> UntrustedFolder:
    """Hold a tokenizer's files to the rules, and its tokens to what the model can embed.

    :raises RequestError: a file is no plain file of the folder, too large, leads to code or to
        another file, or holds far more tokens than the model has rows.
    """
    files = UntrustedFolder(folder)
    trusted = ctx.spec.trust_remote_code
    for name in _entries(files, *_FILES):
        if name.endswith(_NOT_ITS_OWN) or (folder / name).is_dir():
            continue
        files.vet(name, _MAX_BYTES)
        if name in _CONFIGS or name == _ADDED:
            content = files.tokenizer_config(name, trusted=trusted or name == _ADDED)
            _hold_listed(files, name, content)
            _hold_tokens(files, name, list(_tokens(name, content)), ctx)
            _hold_added(files, name, _mapped(name, content), ctx)
        elif name.startswith(_VOCABULARIES) or name.endswith(_VOCABULARY_KINDS):
            _hold_words(files, name, ctx)
    if files.holds(_TEMPLATES):
        templates = UntrustedFolder(files.path(_TEMPLATES))
        for name in _entries(templates, "*.jinja"):
            files.vet(f"{_TEMPLATES}/{name}", _MAX_BYTES)
    return files


def _entries(files: UntrustedFolder, *patterns: str) -> list[str]:
    """Return the files of a folder that match, of which there may be no more than are opened."""
    found = files.entries(*patterns)
    if len(found) > _ENTRIES:
        raise files.refusal(
            ".", f"{len(found):,} files are a tokenizer's by their names, of {_ENTRIES:,} allowed"
        )
    return found


def hold_ids(tokenizer: PreTrainedTokenizerBase, folder: Path, ctx: LoadContext) -> None:
    """Raise ``RequestError`` where an id lies far beyond the rows that there are."""
    highest = max(tokenizer.get_vocab().values(), default=0)
    limit = _words(folder, ctx)
    if highest >= limit:
        raise RequestError(
            f"the tokenizer in {str(folder)!r} has ids up to {highest:,}, and a model"
            f" of {_rows(ctx):,} rows bears {limit:,} at most",
            fix="Check that tokenizer and model belong together.",
            where="tokenizer",
        )


def _mapped(name: str, content: dict[str, Any]) -> int:
    """Count the tokens that a config of a tokenizer adds."""
    if name == _ADDED:
        return len(content)
    return max((len(value) for value in content.values() if isinstance(value, dict)), default=0)


def _hold_listed(files: UntrustedFolder, name: str, content: dict[str, Any]) -> None:
    """Hold lists of special tokens, each of which is compared with all, to a length."""
    for key, value in content.items():
        if isinstance(value, list) and len(value) > _SPECIAL_TOKENS:
            raise files.refusal(
                name,
                f"{key!r} lists {len(value):,} tokens, more than the {_SPECIAL_TOKENS:,} allowed",
            )


def _hold_tokens(
    files: UntrustedFolder, name: str, tokens: list[tuple[str, str]], ctx: LoadContext
) -> None:
    """Hold the text of each token that a file adds or names to a length, and all together."""
    for where, token in tokens:
        if len(token) > _TOKEN_CHARACTERS:
            raise files.refusal(
                name,
                f"{where!r} is a token of {len(token):,} characters, more than the"
                f" {_TOKEN_CHARACTERS:,} allowed",
            )
    sizes = [len(token.encode(errors="replace")) for _, token in tokens]
    usual = _added_tokens(ctx)
    if sum(size**2 for size in sizes) > usual * _USUAL_TOKEN**2:
        raise files.refusal(
            name,
            f"it adds {len(tokens):,} tokens of {sum(sizes):,} bytes, which cost more than the"
            f" {usual:,} of {_USUAL_TOKEN} bytes that are allowed",
        )


def _tokens(name: str, content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the text of each token, and under which key it stands."""
    if name == _ADDED:
        yield from (("a key", token) for token in content)
        return
    for key, value in content.items():
        if not (key.endswith(("_token", "_tokens")) or key == "added_tokens_decoder"):
            continue
        several = value.values() if isinstance(value, dict) else value
        for one in (value, *(several if isinstance(value, dict | list) else ())):
            text = one.get("content") if isinstance(one, dict) else one
            if isinstance(text, str):
                yield key, text


def _hold_added(files: UntrustedFolder, name: str, count: int, ctx: LoadContext) -> None:
    limit = _added_tokens(ctx)
    if count > limit:
        raise _too_many(files, name, f"{count:,} added tokens", limit, ctx)


def _hold_words(files: UntrustedFolder, name: str, ctx: LoadContext) -> None:
    """Hold a vocabulary to its bounds, by counting what each entry of it must have."""
    size = files.vet(name, _MAX_BYTES)
    limit = _words(files.root, ctx)
    whole = name.startswith("tokenizer") and name.endswith(".json")
    if size // 2 <= limit and not whole and not name.endswith(".model"):
        return  # no entry takes less
    data = files.read(name, _MAX_BYTES)
    if name.endswith(".json"):
        words = max(data.count(b":") + data.count(b"["), data.count(b",") // 3)
        if whole and words <= limit + _FIELDS * _added_tokens(ctx):
            words -= _FIELDS * _hold_serialized(files, name, data, ctx)
    elif name.endswith((".txt", ".jinja", ".tiktoken")):
        words = data.count(b"\n")
    else:
        words = len(data) // _PIECE_BYTES
        _hold_pieces(files, name, list(serialized.piece_lengths(data)), ctx)
    if words > limit:
        raise _too_many(files, name, f"up to {words:,} words, merges and added tokens", limit, ctx)


def _hold_serialized(files: UntrustedFolder, name: str, data: bytes, ctx: LoadContext) -> int:
    """Hold what a ``tokenizer.json`` costs beside its words; return how many tokens it adds."""
    try:
        found = serialized.read(data)
    except ValueError as error:
        raise files.refusal(name, f"it is not valid JSON: {error}") from None
    _hold_added(files, name, len(found.added), ctx)
    _hold_tokens(files, name, [("added_tokens", token) for token in found.added], ctx)
    _hold_pieces(files, name, found.pieces, ctx)
    if found.growth > _GROWTH:
        raise files.refusal(
            name,
            f"its normalizer, pre_tokenizer and post_processor can make {found.growth:.3g}"
            f" characters of one, more than the {_GROWTH:,} allowed",
        )
    return len(found.added)


def _hold_pieces(files: UntrustedFolder, name: str, lengths: list[int], ctx: LoadContext) -> None:
    """Hold the bytes of each piece of a Unigram model, and of all together."""
    rows = _rows(ctx) if files.root == ctx.folder else max(_rows(ctx), _NAMED_WORDS // 2)
    limit = _USUAL_PIECE * (rows + _WORDS)
    longest = max(lengths, default=0)
    if longest > _PIECE_LENGTH:
        raise files.refusal(
            name, f"it holds a piece of {longest:,} bytes, more than the {_PIECE_LENGTH:,} allowed"
        )
    if sum(lengths) > limit:
        raise _too_many(files, name, f"pieces of {sum(lengths):,} bytes", limit, ctx)


def _too_many(
    files: UntrustedFolder, name: str, what: str, limit: int, ctx: LoadContext
) -> CheckpointError:
    return files.refusal(
        name,
        f"it holds {what}, and a model of {_rows(ctx):,} rows bears {limit:,} at most",
        "Check that tokenizer and model belong together.",
    )


def _added_tokens(ctx: LoadContext) -> int:
    return max(_ADDED_TOKENS, _rows(ctx) // 2)


def _words(folder: Path, ctx: LoadContext) -> int:
    own = 4 * _rows(ctx) + _WORDS
    return own if folder == ctx.folder else max(own, _NAMED_WORDS)


def _rows(ctx: LoadContext) -> int:
    """Return the rows that the embedding has at the most, by the headers if there are any."""
    if ctx.checkpoint is None:
        return min(getattr(ctx.config.get_text_config(), "vocab_size", 0) or 0, _NAMED_WORDS)
    return max((max(t.shape, default=0) for t in ctx.checkpoint.tensors.values()), default=0)
