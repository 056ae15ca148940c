"""Folders that are made once and kept under a key: each whole or not there at all, and bounded.

Several processes may look, make and clear at once. A folder is written beside its place under a
hidden name, compared by whoever wrote it, and renamed; one that is in use may be removed, since
what is mapped of it stays. Files are told from what they become by their state (size, inode and
both times), beside which their SHA-256 is written down: all bytes are read where the state differs,
or where that is asked for.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from llmload.checkpoint.contents import Checkpoint
from llmload.checkpoint.digests import of_file, of_samples, of_weights
from llmload.checkpoint.filesystem import file_state, settle, sync
from llmload.errors import CheckpointError, LlmloadError, RequestError

MANIFEST: Final = "llmload_kept.json"
_SOURCES: Final = ".sources"
_BUILDING: Final = ".building-"
_GOING: Final = ".going-"
_LOCK: Final = ".lock-"
_KEY_DIGITS: Final = 32
_THREADS: Final = 2
SETTLED_NS: Final = 2 * 10**9
"""A file that changed less than this before it was hashed may change again without another time
stamp: its digest is not written down."""

_Model = TypeVar("_Model", bound=BaseModel)


class _Digested(BaseModel):
    """A file as it was when its digest was taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    state: tuple[int, int, int, int, int]
    """Device, inode, size, and the times of the last change of content and of the inode, in ns."""
    sha256: str


class _Sources(BaseModel):
    """Digests of a checkpoint's files, by path."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: dict[str, _Digested]
    samples: str
    """Digest of a few bytes of each tensor."""


class _Manifest(BaseModel):
    """What stands in a folder about itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    llmload_kept: Literal[1] = 1
    key: str
    about: str
    made_from: dict[str, Any]
    files: dict[str, _Digested]

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.state[2] for file in self.files.values())


class KeptFolder(BaseModel):
    """A folder that is kept."""

    key: str
    """Its name, a digest of what it was made from."""
    about: str
    """What is in it, for people."""
    size: int
    """Bytes of its files."""
    used: float
    """When it was made or last found, in seconds since 1970."""
    folder: str
    """Where it lies."""


def usual_place() -> Path:
    """Return ``$XDG_CACHE_HOME/llmload/kept``, by default ``~/.cache/llmload/kept``."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llmload/kept"
    except RuntimeError:
        raise RequestError("there is no home folder", fix="Name a folder for the cache.") from None


def key_of(made_from: Mapping[str, Any]) -> str:
    """Return the key of a folder by all that decides on what is in it, plain data."""
    text = json.dumps(made_from, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_KEY_DIGITS]


class KeptFolders:
    """The folders that are kept in one place, which belongs to this user alone.

    :param place: need not be there yet.
    :raises RequestError: it is no folder, or others can write to it: what lies there is loaded.
    """

    def __init__(self, place: Path) -> None:
        self.place = place.expanduser().absolute()
        try:
            found = self.place.stat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise RequestError(
                f"{str(self.place)!r} cannot be looked into: {error.strerror}",
                fix="Name another folder.",
            ) from None
        if not self.place.is_dir():
            raise RequestError(f"{str(self.place)!r} is no folder", fix="Name another one.")
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise RequestError(
                f"others than this user can write to {str(self.place)!r}, and what lies there is"
                " loaded",
                fix="Name a folder that is yours alone, or take their rights away with `chmod"
                " go-w`.",
            )

    # --- what is there ----------------------------------------------------------------------------

    def entries(self) -> list[KeptFolder]:
        """Return what is kept, the last used first. What else lies there is passed over."""
        found = [e for path in self._folders() if (e := self._entry(path)) is not None]
        return sorted(found, key=lambda entry: (-entry.used, entry.key))

    def find(self, key: str, *, whole: bool = False) -> Path | None:
        """Return the folder of a key if its files are those that were written, else None.

        :param whole: read and hash every byte of them, also where none seems to have changed.
        """
        folder = self.place / key
        manifest = self._manifest(folder)
        if manifest is None or not _sound(folder, manifest, whole=whole):
            return None
        with suppress(OSError):
            os.utime(folder / MANIFEST)
        return folder

    def has(self, key: str) -> bool:
        """Say whether there seems to be a folder of that key; only small files are looked at."""
        return self._manifest(self.place / key) is not None

    def sources(self, checkpoint: Checkpoint, *, whole: bool = False) -> dict[str, str] | None:
        """Return the SHA-256 that is written down for each file of a checkpoint, by its name.

        None where none is, or where a file's state or a few bytes of any tensor differ.
        """
        with suppress(OSError):
            record = _read(self._record(checkpoint), _Sources)
            states = {str(file.path): file_state(file.path) for file in checkpoint.files}
            if record is None or {p: f.state for p, f in record.files.items()} != states:
                return None
            if whole and record.samples != of_samples(checkpoint):
                return None
            return {file.name: record.files[str(file.path)].sha256 for file in checkpoint.files}
        return None

    # --- what is made -----------------------------------------------------------------------------

    def digests(self, checkpoint: Checkpoint, *, anew: bool = False) -> dict[str, str]:
        """Return the SHA-256 of each file of a checkpoint by its name, and write it down.

        All bytes are read where they have not been, or where ``anew`` asks for it; else one page of
        each tensor. Of a file that is fetched, its version stands for what is in it.

        :raises CheckpointError: a file changed meanwhile.
        """
        if any(file.fetch is not None for file in checkpoint.files):
            return {file.name: file.version or of_weights(file) for file in checkpoint.files}
        known = None if anew else self.sources(checkpoint, whole=True)
        if known is not None:
            return known
        begun = time.time_ns()
        before = {file.path: file_state(file.path) for file in checkpoint.files}
        with ThreadPoolExecutor(_THREADS, "llmload-digest") as pool:
            found = dict(zip(before, pool.map(of_file, before), strict=True))
        samples = of_samples(checkpoint)
        for path, state in before.items():
            if state is None or state != file_state(path):
                raise CheckpointError(
                    "the file changed while it was being hashed",
                    fix="Load again when nothing writes to the folder.",
                    where=str(path),
                )
        settled = all(s is not None and max(s[3:]) < begun - SETTLED_NS for s in before.values())
        if settled:
            files = {
                str(path): {"state": before[path], "sha256": digest}
                for path, digest in found.items()
            }
            with suppress(OSError):
                self._make_place(self.place / _SOURCES)
                record = _Sources.model_validate({"files": files, "samples": samples})
                _write(self._record(checkpoint), record)
        return {file.name: found[file.path] for file in checkpoint.files}

    def keep(
        self,
        key: str,
        made_from: Mapping[str, Any],
        write: Callable[[Path], None],
        *,
        about: str,
        limit: int,
    ) -> str | None:
        """Make the folder of a key, unless another process is at it or has made it.

        :param write: writes all that is to be in it, and compares it with what it should be.
        :param limit: bytes that all folders may take: those not used for longest go.
        :returns: why it was not kept, or None.
        """
        try:
            with self._alone(key) as alone:
                if not alone:
                    return "another process is writing it"
                return self._keep(key, made_from, write, about, limit)
        except OSError as error:
            return f"{error.strerror or error}"
        except LlmloadError as error:
            return str(error).rstrip(".")

    def clear(self, keys: Iterable[str] = ()) -> list[KeptFolder]:
        """Remove folders that are kept, by default all, and return them.

        With all of them go what killed processes left and the digests of sources.

        :raises RequestError: a key is of none.
        """
        entries = self.entries()
        wanted = list(keys)
        chosen = [e for e in entries if not wanted or any(e.key.startswith(k) for k in wanted)]
        for key in wanted:
            if not any(entry.key.startswith(key) for entry in entries):
                raise RequestError(
                    f"nothing is kept under {key!r} in {str(self.place)!r}",
                    fix="See `llmload cache list`.",
                )
        for entry in chosen:
            self._remove(Path(entry.folder))
        if not wanted and self.place.is_dir():
            for path in self.place.iterdir():
                if path.name.startswith((_BUILDING, _GOING, _LOCK)) or path.name == _SOURCES:
                    shutil.rmtree(path, ignore_errors=True)
                    with suppress(OSError):
                        path.unlink(missing_ok=True)
        return chosen

    # --- inside -----------------------------------------------------------------------------------

    def _keep(
        self,
        key: str,
        made_from: Mapping[str, Any],
        write: Callable[[Path], None],
        about: str,
        limit: int,
    ) -> str | None:
        folder = self.place / key
        for left in self.place.glob(f"{_BUILDING}{key}-*"):  # nobody else is at this key
            shutil.rmtree(left, ignore_errors=True)
        if os.path.lexists(folder):
            if folder.is_symlink() or (any(folder.iterdir()) and self._manifest(folder) is None):
                return f"{str(folder)!r} is there, and llmload did not make it"
            if self.find(key) is not None:
                return None
            self._remove(folder)
        building = self.place / f"{_BUILDING}{key}-{os.getpid()}"
        try:
            building.mkdir(mode=0o700)
            write(building)
            files = {
                path.relative_to(building).as_posix(): {
                    "state": file_state(path),
                    "sha256": of_file(path),
                }
                for path in sorted(building.rglob("*"))
                if path.is_file()
            }
            manifest = _Manifest.model_validate(
                {"key": key, "about": about, "made_from": dict(made_from), "files": files}
            )
            if manifest.size > limit:
                return f"it has {manifest.size:,} bytes, of {limit:,} allowed for all"
            _write(building / MANIFEST, manifest)
            settle(building)
            building.replace(folder)
            sync(self.place)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        self._bound(limit, key)
        return None

    def _bound(self, limit: int, newest: str) -> None:
        entries = self.entries()
        entries.sort(key=lambda entry: entry.key != newest)  # the newest stays, others by their use
        total = 0
        for entry in entries:
            total += entry.size
            if total > limit:
                self._remove(Path(entry.folder))
                total -= entry.size

    @contextmanager
    def _alone(self, key: str) -> Iterator[bool]:
        """Say whether this process is the only one to write the folder of a key."""
        self._make_place(self.place)
        file = os.open(self.place / f"{_LOCK}{key}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError:  # no locks on this file system: the rename decides
                pass
            yield True
        finally:
            os.close(file)

    def _make_place(self, place: Path) -> None:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _remove(self, folder: Path) -> None:
        """Take a folder away at once, for whoever looks for it, and then its files."""
        going = self.place / f"{_GOING}{folder.name}-{os.getpid()}-{time.monotonic_ns()}"
        with suppress(OSError):
            folder.rename(going)
            shutil.rmtree(going, ignore_errors=True)

    def _folders(self) -> list[Path]:
        try:
            return sorted(path for path in self.place.iterdir() if not path.name.startswith("."))
        except OSError:
            return []

    def _entry(self, folder: Path) -> KeptFolder | None:
        manifest = self._manifest(folder)
        if manifest is None:
            return None
        with suppress(OSError):
            return KeptFolder(
                key=manifest.key,
                about=manifest.about,
                size=manifest.size,
                used=(folder / MANIFEST).stat().st_mtime,
                folder=str(folder),
            )
        return None

    def _manifest(self, folder: Path) -> _Manifest | None:
        """Return what a folder says of itself, if it is one of ours, under its own key."""
        if folder.is_symlink():
            return None
        found = _read(folder / MANIFEST, _Manifest)
        ours = found is not None and found.key == folder.name == key_of(found.made_from)
        return found if ours else None

    def _record(self, checkpoint: Checkpoint) -> Path:
        names = "\n".join(sorted(str(file.path) for file in checkpoint.files))
        digest = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
        return self.place / _SOURCES / f"{digest[:_KEY_DIGITS]}.json"


def _sound(folder: Path, manifest: _Manifest, *, whole: bool) -> bool:
    """Say whether a folder's files are those that were written, and no others lie there."""
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    if names != {*manifest.files, MANIFEST}:
        return False
    for name, file in manifest.files.items():
        path = folder / name
        if path.is_symlink():
            return False
        if whole or file_state(path) != file.state:
            try:
                if of_file(path) != file.sha256:
                    return False
            except LlmloadError:
                return False
    return True


def _read(path: Path, kind: type[_Model]) -> _Model | None:
    """Return what stands in a small file of ours; None where that is not it."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _write(path: Path, content: BaseModel) -> None:
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        beside.write_text(content.model_dump_json(indent=1), "utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
