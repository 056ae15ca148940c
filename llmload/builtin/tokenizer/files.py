"""Where a tokenizer comes from: its folder, the files in it, and the loading without a network."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmload.builtin.tokenizer import vetting
from llmload.plugin import (
    CheckpointError,
    LlmloadError,
    RequestError,
    UntrustedFolder,
    cache_dir,
    in_one_line,
    locate_files,
    read_config,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmload.builtin.tokenizer.section import TokenizerSection
    from llmload.plugin import LoadContext

# Any of these makes a folder one with a tokenizer; the first alone holds no vocabulary.
_CONFIG = "tokenizer_config.json"
_PIECES = "tokenizer.model"
_FILES = (_CONFIG, "tokenizer*", "vocab.*", "*.model", "tekken.json")


def locate(ctx: LoadContext, section: TokenizerSection) -> Path:
    """Return the folder of the tokenizer: the model's, or the one that is asked for."""
    if section.name_or_path is None:
        if section.revision is not None:
            raise RequestError(
                f"revision {section.revision!r} was asked for without `tokenizer.name_or_path`",
                fix="Name the hub id of the tokenizer, or set the model's `revision`.",
                where="tokenizer.revision",
            )
        return ctx.folder
    place = {"model": section.name_or_path, "revision": section.revision, "subfolder": None}
    try:
        folder = locate_files(ctx.spec.model_copy(update=place), weights=False)
        files = ctx.files.adopt("tokenizer", UntrustedFolder(folder))
        if (folder / "config.json").is_file():
            # transformers reads it to choose the tokenizer's class.
            read_config(files, ctx.spec)
    except CheckpointError as error:
        keys = {"model": "tokenizer.name_or_path", "revision": "tokenizer.revision"}
        raise RequestError(
            problem.model_copy(update={"where": keys.get(problem.where, problem.where)})
            for problem in error.problems
        ) from None
    return folder


def names(folder: Path) -> set[str]:
    """Return the names of a tokenizer's files in a folder."""
    return {path.name for pattern in _FILES for path in folder.glob(pattern)}


def load(folder: Path, ctx: LoadContext, section: TokenizerSection) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local folder, without asking any network.

    transformers 5 makes a tokenizer of nothing but special tokens where the vocabulary is missing;
    here that is refused.
    """
    from transformers import AutoTokenizer

    files = vetting.vet(folder, ctx)
    with faults_refused(folder):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder,
                use_fast=section.use_fast,
                trust_remote_code=ctx.spec.trust_remote_code,
                local_files_only=True,
                cache_dir=cache_dir(ctx.spec),
            )
        except Exception as error:  # transformers raises many kinds for a bad file
            if names(folder) == {_CONFIG}:
                raise _no_vocabulary(folder, []) from error
            if _wants_sentencepiece(folder):
                raise RequestError(
                    f"the vocabulary in {str(folder / _PIECES)!r} is read by sentencepiece, which"
                    " is not installed",
                    fix="Install it with `pip install sentencepiece protobuf`.",
                    where="tokenizer.name_or_path",
                ) from error
            raise _cannot_be_loaded(folder, in_one_line(error)) from error
    files.check()
    if tokenizer is False:  # what transformers 4.51 gives where a slow one's files are missing
        raise RequestError(
            f"the folder {str(folder)!r} holds no files of a slow tokenizer",
            fix="Remove `tokenizer.use_fast`.",
            where="tokenizer.use_fast",
        )
    with faults_refused(folder):
        expected = list(tokenizer.vocab_files_names.values())
        if expected and names(folder) == {_CONFIG}:
            raise _no_vocabulary(folder, [*dict.fromkeys([*expected, "tokenizer.json"])])
        vetting.hold_ids(tokenizer, folder, ctx)
    return tokenizer


@contextmanager
def faults_refused(folder: Path) -> Iterator[None]:
    """Refuse a tokenizer that fails when it is used, or whose parts make the Rust beneath panic.

    What it raises depends on what its files have put in whose place. No ``except Exception`` meets
    a panic.
    """
    try:
        yield
    except LlmloadError:
        raise
    except Exception as error:
        raise _cannot_be_loaded(folder, in_one_line(error)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise _cannot_be_loaded(folder, f"its Rust code panics: {in_one_line(error)}") from None


def _wants_sentencepiece(folder: Path) -> bool:
    """Whether the vocabulary is of sentencepiece, which transformers takes for one of tiktoken
    where it finds no sentencepiece."""
    if importlib.util.find_spec("sentencepiece") is not None or not (folder / _PIECES).is_file():
        return False
    with (folder / _PIECES).open("rb") as file:
        # A protobuf that begins with a piece, where tiktoken has lines of base64.
        return file.read(1) == b"\n" and not (folder / "tokenizer.json").exists()


def _cannot_be_loaded(folder: Path, reason: str) -> RequestError:
    return RequestError(
        f"the tokenizer in {str(folder)!r} cannot be loaded: {reason.rstrip('.')}",
        fix="Save or download it again, or name another in `tokenizer.name_or_path`.",
        where="tokenizer.name_or_path",
    )


def _no_vocabulary(folder: Path, expected: list[str]) -> RequestError:
    none_of = f": none of {', '.join(expected)}" if expected else ""
    return RequestError(
        f"the folder {str(folder)!r} holds a {_CONFIG}, but no vocabulary{none_of}",
        fix="Save or download it again, or name another in `tokenizer.name_or_path`.",
        where="tokenizer.name_or_path",
    )
