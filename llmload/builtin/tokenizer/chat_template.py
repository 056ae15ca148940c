"""The chat template that a spec asks for: written out, in a file, or that of another tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmload.plugin import (
    CheckpointError,
    RequestError,
    UntrustedFolder,
    local_path,
    locate_files,
    read_file,
)

if TYPE_CHECKING:
    from llmload.plugin import LoadContext

_WHERE = "tokenizer.chat_template"
_MARKS = ("{{", "{%")
"""Without one of them a template renders every conversation as the same words."""
_FILE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_WAYS = (
    "Write the template itself, the path of a file that holds it, or a folder or hub id whose"
    " tokenizer has one."
)


def find(text: str | None, ctx: LoadContext) -> str | None:
    """Return the template that ``chat_template`` asks for; None where it asks for none.

    :raises RequestError: it is no template, and leads to none.
    """
    if text is None or is_template(text):
        return text
    path = local_path(text, _WHERE)
    if path.is_dir():
        return _of_tokenizer(path, ctx)
    if path.exists():
        found = read_file(path, _WHERE, "the chat template").decode("utf-8", "replace")
        if is_template(found):
            return found
        raise _refusal(f"the file {text!r} holds no chat template: it has no `{{{{` and no `{{%`")
    if text.endswith(".jinja"):
        raise _refusal(f"the chat template file {text!r} does not exist")
    if text.count("/") != 1 or any(letter.isspace() for letter in text):
        raise _refusal(
            f"{text!r} is no chat template: it has no `{{{{` and no `{{%`, and no file or folder is"
            " called so"
        )
    try:
        place = {"model": text, "revision": None, "subfolder": None}
        folder = locate_files(ctx.spec.model_copy(update=place), weights=False)
    except CheckpointError as error:
        raise RequestError(p.model_copy(update={"where": _WHERE}) for p in error.problems) from None
    return _of_tokenizer(folder, ctx)


def is_template(text: str) -> bool:
    """Say whether a text can be a template."""
    return any(mark in text for mark in _MARKS)


def _of_tokenizer(folder: Path, ctx: LoadContext) -> str:
    """Return the template that lies in a folder, as transformers finds it."""
    files = UntrustedFolder(folder)
    found: object = None
    if files.holds(_FILE):
        found = files.read(_FILE).decode("utf-8", "replace")
    elif files.holds(_CONFIG):
        trusted = ctx.spec.trust_remote_code
        content = files.tokenizer_config(_CONFIG, trusted=trusted)
        found = content.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = [each for each in found if isinstance(each, dict)]
        found = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if isinstance(found, str) and is_template(found):
        return found
    raise _refusal(f"the tokenizer in {str(folder)!r} has no chat template")


def _refusal(message: str) -> RequestError:
    return RequestError(message, fix=_WAYS, where=_WHERE)
