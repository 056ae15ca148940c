"""Small files of a folder that nobody vouches for: configs, tokenizers, templates.

One rule for all that a load opens beside the weights: a plain file, of a size that such a file can
have, reached by no link that leaves the folder (but for the hub's cache, whose snapshots are links
into ``blobs``), its JSON strict. What was read is remembered: a library that opens the file again,
as transformers does, has read the same bytes if :meth:`UntrustedFolder.check` finds it unchanged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llmload.checkpoint import strict_json
from llmload.checkpoint.filesystem import FileState, file_state, state_of
from llmload.checkpoint.folder import inside, regular_file
from llmload.checkpoint.strict_json import short
from llmload.errors import CheckpointError, Problem

MAX_CONFIG_BYTES = 4 * 2**20
"""Of one config; the largest of the hub, with a scale per layer, have a tenth."""
MAX_TEXT_BYTES = 256 * 2**20
"""Of one file of a tokenizer; vocabularies of a quarter of a million words have a tenth."""

# Keys by which a config.json has made transformers fetch or run code although remote code was not
# trusted: CVE-2026-4372 (transformers 4.56 to 5.2), CVE-2026-5241 (5.2.0).
_CODE_KEYS = frozenset(
    {"_attn_implementation_internal", "_experts_implementation_internal", "trust_remote_code"}
)
# Keys whose value, or any value below them, may name a repository to fetch from.
_REPOSITORY_KEYS = frozenset(
    {
        "_attn_implementation",
        "_experts_implementation",
        "attn_implementation",
        "backbone",
        "custom_generate",
        "experts_implementation",
        "kernel_config",
        "vision_backbone",
    }
)
# Keys that make transformers read another file in place of the one that was checked.
_REDIRECTIONS = frozenset(
    {
        "cache_file",
        "configuration_files",
        "covariance_file",
        "fast_tokenizer_files",
        "gguf_file",
        "init_inputs",
    }
)
# Names of files that old tokenizers were saved with, and that nothing opens.
_NOT_OPENED = frozenset({"special_tokens_map_file", "added_tokens_file", "tokenizer_config_file"})
# What PEFT writes; another module would be imported by the old one (0.13.2).
_MEGATRON = (None, "megatron.core")

# Templates are files of their own in a saved folder: CVE-2026-9856 (transformers before 5.10).
_TEMPLATE = re.compile(r"[\w-]{1,100}")

_AGAIN = "Save or download the folder again."
_LFS = b"version https://git-lfs"
_POINTER_BYTES = 1024
"""Below which a file may be a pointer; they have less than 200."""
_SHOWN = 20


@dataclass(frozen=True)
class Limits:
    """How large a JSON file may be."""

    size: int
    """Bytes."""
    values: int
    """Values in it, those in lists and objects too."""


CONFIG = Limits(MAX_CONFIG_BYTES, 100_000)
TOKENIZER_CONFIG = Limits(64 * 2**20, 1_000_000)
"""The flags of each added token stand there: seven values for each."""


class UntrustedFolder:
    """A model folder, tokenizer folder or adapter folder, of which some files are read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.others: dict[str, UntrustedFolder] = {}
        """Further folders that the same load opens files of, by what they are for."""
        self._seen: dict[Path, FileState] = {}

    def adopt(self, role: str, folder: UntrustedFolder) -> UntrustedFolder:
        """Count another folder among those of this load, and return it.

        :param role: what it is for in one word, such as ``tokenizer``; the last one of it counts.
        """
        self.others[role] = folder
        return folder

    def holds(self, name: str) -> bool:
        """Say whether the folder has an entry of that name, of whatever kind."""
        return os.path.lexists(self.root / name)

    def config(
        self, name: str, what: str, *, trusted: bool = False, limits: Limits = CONFIG
    ) -> dict[str, Any]:
        """Return the object that a JSON file holds.

        :param what: what a message calls the file, such as ``the config``.
        :param trusted: the spec trusts code from the folder: a key may lead to some.
        :raises CheckpointError: not a plain file of the folder, too large, not strict JSON, or with
            a key by which a library would run or fetch code, or read another file instead.
        """
        try:
            content = strict_json.loads_config(self.read(name, limits.size), limits.values)
        except ValueError as error:
            raise self.refusal(name, f"{what} is not valid JSON: {error}") from None
        if not isinstance(content, dict):
            raise self.refusal(name, f"{what} is a JSON {type(content).__name__}, not an object")
        file = str(self.root / name)
        problems = [*_redirections(content, file)]
        if not trusted:
            problems += [
                Problem(
                    file=file,
                    where=path,
                    message=f"{what} sets {path!r} to {short(value)}, by which a model folder can"
                    " make code run that nobody here chose",
                    fix=f"Remove the key from {what}, or set `trust_remote_code: true` if you trust"
                    " whoever made the folder.",
                )
                for path, value in _code_paths(content)
            ]
        if problems:
            raise CheckpointError(problems[:_SHOWN])
        return content

    def tokenizer_config(self, name: str, *, trusted: bool) -> dict[str, Any]:
        """Return the object that a config of a tokenizer holds, larger than others may be."""
        return self.config(name, "the file", trusted=trusted, limits=TOKENIZER_CONFIG)

    def path(self, name: str) -> Path:
        """Return the real path of an entry.

        :raises CheckpointError: it leads out of the folder.
        """
        return inside(self.root, self.root / name)

    def read(self, name: str, limit: int = MAX_TEXT_BYTES) -> bytes:
        """Return the bytes of a file.

        :raises CheckpointError: not a plain file of the folder, or of more than ``limit`` bytes.
        """
        with regular_file(self.path(name)) as (descriptor, state):
            self._hold(name, descriptor, state, limit)
            with os.fdopen(os.dup(descriptor), "rb") as file:
                data = file.read(limit + 1)
            if len(data) != state.st_size:
                raise self.refusal(name, "the file changed while it was read")
        return data

    def entries(self, *patterns: str) -> list[str]:
        """Return the names of entries that match any of some patterns, sub-folders not looked in.

        :raises CheckpointError: the folder cannot be listed.
        """
        try:
            with os.scandir(self.root) as found:
                names = sorted(entry.name for entry in found)
        except OSError as error:
            raise self.refusal(".", f"the folder cannot be listed: {error.strerror}") from None
        return [name for name in names if any(fnmatchcase(name, p) for p in patterns)]

    def vet(self, name: str, limit: int = MAX_TEXT_BYTES) -> int:
        """Hold a file to the rules without reading it, and return its size in bytes.

        :raises CheckpointError: not a plain file of the folder, or of more than ``limit`` bytes.
        """
        with regular_file(self.path(name)) as (descriptor, state):
            self._hold(name, descriptor, state, limit)
            return state.st_size

    def check(self) -> None:
        """Raise ``CheckpointError`` where a file is no longer the one that was read or vetted."""
        for path, seen in self._seen.items():
            if file_state(path) != seen:
                raise self.refusal(
                    path.name,
                    "the file changed while it was being loaded",
                    "Load again when nothing writes to the folder.",
                )
        for folder in self.others.values():
            folder.check()

    def refusal(self, name: str, message: str, fix: str = _AGAIN) -> CheckpointError:
        """Return the error about one file, to be raised by the caller."""
        return CheckpointError(message, fix=fix, file=str(self.root / name))

    def _hold(self, name: str, descriptor: int, state: os.stat_result, limit: int) -> None:
        if state.st_size > limit:
            raise self.refusal(
                name, f"the file has {state.st_size:,} bytes, more than the {limit:,} allowed"
            )
        if state.st_size < _POINTER_BYTES and os.pread(descriptor, len(_LFS), 0) == _LFS:
            raise self.refusal(
                name,
                "a Git LFS pointer lies where the file should be",
                "Fetch the files first, for example with git lfs pull.",
            )
        self._seen[self.root / name] = state_of(state)


def read_file(path: Path, where: str, what: str, limit: int = MAX_CONFIG_BYTES) -> bytes:
    """Return the bytes of a small file that a spec names: a plain file, wherever it is.

    :param where: the key of the spec that names it.
    :param what: what a message calls it, such as ``the chat template``.
    :raises CheckpointError: it cannot be opened, is no plain file, or is larger than ``limit``.
    """
    try:
        with regular_file(Path(os.path.realpath(path))) as (descriptor, state):
            if state.st_size <= limit:
                with os.fdopen(os.dup(descriptor), "rb") as file:
                    return file.read(limit + 1)[:limit]
            message = f"it has {state.st_size:,} bytes, more than the {limit:,} allowed"
    except CheckpointError as error:
        message = error.problems[0].message
    raise CheckpointError(
        f"{what} cannot be read: {message}", fix="Check the name.", where=where, file=str(path)
    )


def local_path(text: str, where: str) -> Path:
    """Return a path that a user wrote, ``~`` resolved; it need not exist.

    :param where: the key of the spec that holds it.
    :raises CheckpointError: no path of this system can be called so.
    """
    try:
        path = Path(text).expanduser()
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as fault:
        reason = (getattr(fault, "strerror", None) or str(fault)).rstrip(".")
        raise CheckpointError(
            f"the path {short(text)} cannot be opened: {reason}", fix="Check the path.", where=where
        ) from None
    return path


def _redirections(content: dict[str, Any], file: str) -> Iterator[Problem]:
    """Yield the keys that make a library read another file than the one that was checked."""
    named = {key for key in _REDIRECTIONS if content.get(key)}
    named |= {key for key, value in content.items() if key.endswith("_file") and _is_path(value)}
    for key in sorted(named - _NOT_OPENED):
        yield Problem(
            file=file,
            where=key,
            message=f"{key!r} names other files to read, {short(content[key])}, which nobody would"
            " have checked",
            fix="Remove the key, and keep the file that fits under its plain name.",
        )
    for name in _template_names(content.get("chat_template")):
        if not (isinstance(name, str) and _TEMPLATE.fullmatch(name)):
            yield Problem(
                file=file,
                where="chat_template",
                message=f"'chat_template' calls a template {short(name)}, and transformers makes"
                " file names of them when it saves",
                fix="Call it by one word.",
            )
    auto_map = content.get("auto_map")
    if auto_map is not None and not isinstance(auto_map, dict | list):
        yield Problem(
            file=file,
            where="auto_map",
            message=f"'auto_map' is {short(auto_map)}, and maps classes of transformers to code",
            fix="Remove the key.",
        )


def _template_names(templates: Any) -> list[Any]:
    """Return what the templates of a tokenizer are called, where there are several."""
    if isinstance(templates, dict):
        return list(templates)
    named = templates if isinstance(templates, list) else []
    return [each.get("name") for each in named if isinstance(each, dict)]


def _is_path(value: Any) -> bool:
    """Say whether a value leads out of the folder that its file lies in."""
    return isinstance(value, str) and (not {"/", "\\", "~"}.isdisjoint(value) or ".." in value)


def _code_paths(
    node: Any, path: str = "", names_repositories: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yield dotted path and value of the keys that lead to code, at any depth."""
    if isinstance(node, dict):
        children = node
    elif isinstance(node, list):
        children = {str(position): child for position, child in enumerate(node)}
    else:
        if names_repositories and isinstance(node, str) and ("/" in node or ":" in node):
            yield path, node
        return
    for key, value in children.items():
        here = f"{path}.{key}" if path else key
        if (
            (key in _CODE_KEYS and value)
            or _is_pythons_own(key)
            or (key == "megatron_core" and value not in _MEGATRON)
        ):
            yield here, value
        else:
            yield from _code_paths(value, here, names_repositories or key in _REPOSITORY_KEYS)


def _is_pythons_own(key: str) -> bool:
    """Say whether a key would become an attribute that Python itself calls."""
    return key.startswith("__") and key.endswith("__") and key != "__float__"
