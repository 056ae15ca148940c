"""Small files of a folder that nobody vouches for: configs, tokenizers, templates.

One rule for all that a load opens beside the weights: a plain file, of a size that such a file can
have, reached by no link that leaves the folder (but for the hub's cache, whose snapshots are links
into ``blobs``), its JSON strict. What was read is remembered: a library that opens the file again,
as transformers does, has read the same bytes if :meth:`UntrustedFolder.check` finds it unchanged.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llmload.checkpoint import strict_json
from llmload.checkpoint.folder import inside, regular_file
from llmload.errors import CheckpointError, LlmloadError, Problem

MAX_CONFIG_BYTES = 4 * 2**20
"""Of one config; the largest of the hub, with a scale per layer, have a tenth."""
MAX_TEXT_BYTES = 256 * 2**20
"""Of one file of a tokenizer; vocabularies of a quarter of a million words have a tenth."""

_AGAIN = "Save or download the folder again."
_Identity = tuple[int, int, int, int, int]


class UntrustedFolder:
    """A model folder, tokenizer folder or adapter folder, of which some files are read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._seen: dict[Path, _Identity] = {}

    def holds(self, name: str) -> bool:
        """Say whether the folder has an entry of that name, of whatever kind."""
        return os.path.lexists(self.root / name)

    def config(self, name: str, what: str) -> dict[str, Any]:
        """Return the object that a JSON file holds.

        :param what: what a message calls the file, such as ``the config``.
        :raises CheckpointError: not a plain file of the folder, too large, or not strict JSON.
        """
        try:
            content = strict_json.loads_config(self.read(name, MAX_CONFIG_BYTES))
        except ValueError as error:
            raise self.refusal(name, f"{what} is not valid JSON: {error}") from None
        if not isinstance(content, dict):
            raise self.refusal(name, f"{what} is a JSON {type(content).__name__}, not an object")
        return content

    def read(self, name: str, limit: int = MAX_TEXT_BYTES) -> bytes:
        """Return the bytes of a file.

        :raises CheckpointError: not a plain file of the folder, or of more than ``limit`` bytes.
        """
        with regular_file(inside(self.root, self.root / name)) as (descriptor, state):
            self._hold_to_size(name, state, limit)
            with os.fdopen(os.dup(descriptor), "rb") as file:
                data = file.read(limit + 1)
            if len(data) != state.st_size:
                raise self.refusal(name, "the file changed while it was read")
        return data

    def vet(self, name: str, limit: int = MAX_TEXT_BYTES) -> None:
        """Hold a file to the rules, without reading it; raises ``CheckpointError``."""
        with regular_file(inside(self.root, self.root / name)) as (_, state):
            self._hold_to_size(name, state, limit)

    def check(self) -> None:
        """Raise ``CheckpointError`` where a file is no longer the one that was read or vetted."""
        for path, seen in self._seen.items():
            try:
                now = _identity(os.stat(path))
            except OSError:
                now = None
            if now != seen:
                raise self.refusal(
                    path.name,
                    "the file changed while it was being loaded",
                    "Load again when nothing writes to the folder.",
                )

    def refusal(self, name: str, message: str, fix: str = _AGAIN) -> CheckpointError:
        """Return the error about one file, to be raised by the caller."""
        return CheckpointError(Problem(file=str(self.root / name), message=message, fix=fix))

    def _hold_to_size(self, name: str, state: os.stat_result, limit: int) -> None:
        if state.st_size > limit:
            raise self.refusal(
                name, f"the file has {state.st_size:,} bytes, more than the {limit:,} allowed"
            )
        self._seen[self.root / name] = _identity(state)


def _identity(state: os.stat_result) -> _Identity:
    # The time of the last change of the inode, too, which nobody can put back.
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def local_path(text: str, where: str, error: type[LlmloadError] = CheckpointError) -> Path:
    """Return a path that a user wrote, ``~`` resolved; it need not exist.

    :param where: the key of the spec that holds it.
    :raises LlmloadError: of the kind ``error``: no path of this system can be called so.
    """
    try:
        path = Path(text).expanduser()
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as fault:
        reason = getattr(fault, "strerror", None) or str(fault)
        raise error(
            Problem(
                where=where,
                message=f"the path {strict_json.short(text)} cannot be opened: {reason}",
                fix="Check the path.",
            )
        ) from None
    return path
