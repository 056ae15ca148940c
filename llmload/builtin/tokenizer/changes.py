"""What the section ``tokenizer`` changes in a tokenizer, step by step.

Each step yields the problems it finds and leaves the tokenizer alone where it finds one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmload.plugin import Problem, closest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmload.builtin.tokenizer.section import TokenizerSection


def change(
    tokenizer: PreTrainedTokenizerBase, section: TokenizerSection, template: str | None
) -> Iterator[Problem]:
    """Change ``tokenizer`` in place as ``section`` says.

    :param template: what ``chat_template`` leads to.
    """
    _add_tokens(tokenizer, section)
    yield from _set_pad_token(tokenizer, section)
    for attribute in ("padding_side", "truncation_side", "model_max_length"):
        value = getattr(section, attribute)
        if value is not None:
            setattr(tokenizer, attribute, value)
    yield from _frame(tokenizer, section)
    yield from _set_chat_template(tokenizer, template)
    if section.eos_config_fields and tokenizer.eos_token is None:
        yield Problem(
            where="tokenizer.eos_config_fields",
            message="the tokenizer has no eos token whose id they could hold",
            fix="Set it in `tokenizer.add_special_tokens: {eos_token: ...}`.",
        )


def _add_tokens(tokenizer: PreTrainedTokenizerBase, section: TokenizerSection) -> None:
    from tokenizers import AddedToken

    for entry in section.add_tokens:
        content, flags = (entry, {}) if isinstance(entry, str) else (entry.content, entry.flags())
        special = flags.get("special", False)
        tokenizer.add_tokens([AddedToken(content, **flags)], special_tokens=special)
    named = section.add_special_tokens.model_dump(exclude_defaults=True)
    # False: the special tokens that are there stay. The parameter's name changed with 5.0.
    tokenizer.add_special_tokens(named, False)


def _set_pad_token(
    tokenizer: PreTrainedTokenizerBase, section: TokenizerSection
) -> Iterator[Problem]:
    asked = section.pad_token
    if asked is not None and not (section.keep_pad and tokenizer.pad_token is not None):
        token = getattr(tokenizer, f"{asked}_token") if asked in ("eos", "unk") else asked
        if token is None:
            yield Problem(
                where="tokenizer.pad_token",
                message=f"the pad token is to be the {asked} token, but the tokenizer has none",
                fix=f"Name a token of the vocabulary, or set `tokenizer.add_special_tokens:"
                f" {{{asked}_token: ...}}`.",
            )
            return
        vocabulary = tokenizer.get_vocab()
        if token not in vocabulary:
            yield Problem(
                where="tokenizer.pad_token",
                message=f"the pad token {token!r} is not among the {len(vocabulary)} tokens of the"
                " vocabulary",
                fix=f"{_nearest(token, vocabulary)}List it in `tokenizer.add_tokens` to add it.",
            )
            return
        if tokenizer.pad_token not in (None, token) and not section.overwrite_pad:
            yield Problem(
                where="tokenizer.pad_token",
                message=f"the tokenizer already has the pad token {tokenizer.pad_token!r}, and"
                f" {token!r} was asked for",
                fix="Set `tokenizer.keep_pad: true` to keep it, or `overwrite_pad: true`.",
            )
            return
        if vocabulary[token] not in tokenizer.added_tokens_decoder and token not in {
            *tokenizer.all_special_tokens
        }:
            yield Problem(
                where="tokenizer.pad_token",
                severity="warning",
                message=f"the pad token {token!r} is an ordinary token of the vocabulary: where a"
                " text has it, a loss that leaves out padding leaves it out",
                fix="Give padding a token of its own: list it in `tokenizer.add_tokens`.",
            )
        # The token with its own flags, so that an eos token that pads stays what it was.
        flagged = tokenizer.added_tokens_decoder.get(vocabulary[token], token)
        tokenizer.add_special_tokens({"pad_token": flagged})
    if tokenizer.pad_token is not None and tokenizer.pad_token == tokenizer.eos_token:
        yield Problem(
            where="tokenizer.pad_token",
            severity="warning",
            message=f"the pad token is the eos token {tokenizer.eos_token!r}: a loss that leaves"
            " out padding leaves out the end of each text, and the model may never learn to stop",
            fix="Give padding a token of its own, or mask labels by attention mask and not by id.",
        )


def _nearest(token: str, vocabulary: dict[str, int]) -> str:
    matches = closest(token, vocabulary, 3)
    return f"Did you mean {' or '.join(map(repr, matches))}? " if matches else ""


def _frame(tokenizer: PreTrainedTokenizerBase, section: TokenizerSection) -> Iterator[Problem]:
    """Put bos before and eos after every text, or leave them out.

    What a tokenizer does is read off an encoded text: Llama 3 adds bos by its post-processor while
    its ``add_bos_token`` is false. Both flags are set together, because setting one rebuilds the
    post-processor from the two (transformers 5).
    """
    wanted = {"bos": section.add_bos_token, "eos": section.add_eos_token}
    found = _framed(tokenizer)
    if all(value in (None, found[kind]) for kind, value in wanted.items()):
        return
    problems = [
        Problem(
            where=f"tokenizer.add_{kind}_token",
            message=f"the tokenizer ({type(tokenizer).__name__}) has no {kind} token to add",
            fix=f"Set it in `tokenizer.add_special_tokens: {{{kind}_token: ...}}`.",
        )
        for kind, value in wanted.items()
        if value and getattr(tokenizer, f"{kind}_token") is None
    ]
    if not problems:
        asked = {kind: found[kind] if value is None else value for kind, value in wanted.items()}
        _frame_texts(tokenizer, **asked)
        now = _framed(tokenizer)
        problems = [
            Problem(
                where=f"tokenizer.add_{kind}_token",
                message=f"{type(tokenizer).__name__} {'adds' if now[kind] else 'does not add'} the"
                f" {kind} token, and cannot be told otherwise",
                fix=f"Remove `tokenizer.add_{kind}_token`.",
            )
            for kind, value in wanted.items()
            if value not in (None, now[kind])
        ]
    yield from problems


def _frame_texts(tokenizer: PreTrainedTokenizerBase, *, bos: bool, eos: bool) -> None:
    """Have a tokenizer begin every text with bos and end it with eos, or not; in place.

    Since 5.0 two attributes say so. Most fast tokenizers of 4.51.3 lack them and have a
    post-processor of their file's: it is replaced by the one that 5.0 would make, unless it adds
    other tokens too.
    """
    asked = {"bos": bos, "eos": eos}
    known = [kind for kind in asked if hasattr(tokenizer, f"add_{kind}_token")]
    for kind in known:
        setattr(tokenizer, f"add_{kind}_token", asked[kind])
    if known or not tokenizer.is_fast:
        return
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in asked}
    added = {*tokenizer.encode("a")} - {*tokenizer.encode("a", add_special_tokens=False)}
    if not added <= set(ids.values()):
        return
    from tokenizers.processors import TemplateProcessing

    start = [f"{tokenizer.bos_token}"] if bos else []
    end = [f"{tokenizer.eos_token}"] if eos else []
    texts = {"A": [*start, "$A", *end], "B": [*start, "$B", *end]}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[f"{piece}:0" for piece in texts["A"]],
        pair=[f"{piece}:0" for piece in texts["A"]] + [f"{piece}:1" for piece in texts["B"]],
        special_tokens=[
            (getattr(tokenizer, f"{kind}_token"), ids[kind]) for kind in asked if asked[kind]
        ],
    )


def _framed(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Say whether encoding a text adds ``bos`` before it and ``eos`` after it."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    # A vocabulary without "a" and without an unknown token has nothing between the two.
    starts = range(len(full)) if bare else ()
    start = next((i for i in starts if full[i : i + len(bare)] == bare), None)
    before, after = (full, full) if start is None else (full[:start], full[start + len(bare) :])
    return {"bos": tokenizer.bos_token_id in before, "eos": tokenizer.eos_token_id in after}


def _set_chat_template(
    tokenizer: PreTrainedTokenizerBase, template: str | None
) -> Iterator[Problem]:
    import jinja2

    if template is None:
        return
    conversation = [{"role": "user", "content": ""}]
    try:
        tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        yield Problem(
            where="tokenizer.chat_template",
            message=f"the chat template has a Jinja error in line {error.lineno}:"
            f" {(error.message or '').rstrip('.')}",
            fix="Mend the template.",
        )
        return
    except Exception:
        pass  # It compiles, which is all that counts: it may well refuse this conversation.
    tokenizer.chat_template = template
