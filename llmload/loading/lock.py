"""What exactly was loaded, written down, and a later load held to it.

A lock has the size and SHA-256 of every file that a load opens, the resolved spec, the revision and
the plugins with their versions. Headers cannot tell two equal-shaped tensors that were swapped, a
shard of another revision or a changed ``rope_theta``; the lock can. What headers and small files
tell is compared before a weight is read; the weights are hashed while they are read.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmload.checkpoint.digests import of_file, of_weights
from llmload.checkpoint.untrusted import MAX_TEXT_BYTES, UntrustedFolder, read_file
from llmload.errors import CheckpointError, Problem
from llmload.hf.bars import track
from llmload.spec.files import read as read_spec

if TYPE_CHECKING:
    from llmload.checkpoint import CheckpointFile
    from llmload.loading.prepared import Prepared

_PER_MACHINE: Final = ("cache_dir", "local_files_only", "lock", "model", "revision", "weights_from")
"""Keys of a spec that say where files are or how to get them, not what they hold."""
_BESIDE_WEIGHTS: Final = (
    "*.json",
    "*.jinja",
    "*.model",
    "additional_chat_templates/*.jinja",
    "merges.txt",
    "tokenizer*",
    "vocab.*",
)
_CODE: Final = ("*.py",)
_MAKE: Final = "If the change is meant, make the lock anew with `llmload lock`."
_SUFFIXES: Final = (".bin", ".pt", ".safetensors")
_SHOWN = 8
_THREADS = 2
_HASHING: Final = "Hashing files"


class LockedFile(BaseModel):
    """One file as it was."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    """Bytes."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of all of them, in hexadecimal digits."""


class Lock(BaseModel):
    """What one load opens and is made of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    llmload_lock: Literal[1] = 1
    """Version of this format."""
    model: str
    """The spec's ``model``, for people: files are compared by what they hold."""
    revision: str | None = None
    """Commit of the hub's snapshot, where the model is one."""
    spec: dict[str, Any]
    """The spec, defaults left out, without the keys that only say where files are."""
    plugins: dict[str, str]
    """Plugins that take part, in plan order -> distribution and version."""
    files: dict[str, LockedFile]
    """By name in the model folder; a file of another folder is called by what it is for, such as
    ``adapter/adapter_config.json``."""


def make(prepared: Prepared) -> Lock:
    """Hash everything that a load would open.

    :raises CheckpointError: a file is gone, or no plain file.
    """
    files = _opened(prepared)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(_Opened.sha256, files.values())
        digests = dict(zip(track(files, _HASHING), found, strict=True))
    return Lock(
        model=str(prepared.ctx.spec.model),
        revision=_revision(prepared),
        spec=_asked(prepared),
        plugins=dict(prepared.plan.plugins),
        files={
            name: LockedFile(size=file.size, sha256=digests[name]) for name, file in files.items()
        },
    )


def read(path: str) -> Lock:
    """Read a lock file.

    :raises CheckpointError: there is none, or it is not one.
    """
    content = read_file(Path(path).expanduser(), "lock", "the lock file", MAX_TEXT_BYTES)
    try:
        return Lock.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"this is not a lock file: {place + ': ' if place else ''}{first['msg']}",
            fix="Make one with `llmload lock`.",
            where="lock",
            file=path,
        ) from None


def write(lock: Lock, path: Path) -> None:
    """Write a lock file, all of it or nothing."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(lock.model_dump(), indent=2, ensure_ascii=False) + "\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def problems(prepared: Prepared) -> list[Problem]:
    """Compare what can be known before a weight is read with the lock that the spec names."""
    path = prepared.ctx.spec.lock
    if path is None:
        return []
    try:
        locked = read(path)
    except CheckpointError as error:
        return list(error.problems)
    return [_problem(text) for text in differences(locked, prepared)]


def differences(locked: Lock, prepared: Prepared) -> Iterator[str]:
    """Yield what differs from a lock, but for what only the bytes of the weights tell."""
    found = _revision(prepared)
    if locked.revision is not None and found is not None and locked.revision != found:
        yield f"the revision is {found}, locked is {locked.revision}"
    for what, before, now in (
        ("the spec's", locked.spec, _asked(prepared)),
        ("plugin", locked.plugins, prepared.plan.plugins),
    ):
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                yield (
                    f"{what} {key!r} is {_text(now.get(key))}, locked is {_text(before.get(key))}"
                )
    if list(locked.plugins) != list(prepared.plan.plugins) and locked.plugins.keys() == (
        prepared.plan.plugins.keys()
    ):
        yield f"plugins come in the order {', '.join(prepared.plan.plugins)}"
    files = _opened(prepared)
    for name in sorted(locked.files.keys() | files.keys()):
        if name not in files:
            yield f"the file {name!r} is missing"
        elif name not in locked.files:
            yield f"the file {name!r} is not in the lock"
        else:
            file, before_ = files[name], locked.files[name]
            if file.size != before_.size:
                yield f"the file {name!r} has {file.size:,} bytes, locked are {before_.size:,}"
            elif not file.is_of_weights:
                yield from _other_content(name, file, before_)


def wrong_weights(locked: Lock, prepared: Prepared) -> Iterator[str]:
    """Hash the files of weights, and yield those that are not as locked."""
    for name, file in track(_weights(prepared, locked).items(), _HASHING):
        yield from _other_content(name, file, locked.files[name])


@contextmanager
def held_to(prepared: Prepared) -> Iterator[None]:
    """Hash the weights while the block reads them, where the spec names a lock.

    Of several ranks of one host the first does it for all.

    :raises CheckpointError: at the end of the block: a file is not as locked.
    """
    path = prepared.ctx.spec.lock
    if path is None or os.environ.get("LOCAL_RANK", "0") != "0":
        yield
        return
    locked = read(path)
    stop = threading.Event()
    pool = ThreadPoolExecutor(_THREADS, "llmload-lock")
    try:
        hashed: list[Future[list[str]]] = [
            pool.submit(_unless(stop, name, file, locked.files[name]))
            for name, file in _weights(prepared, locked).items()
        ]
        yield
        wrong = [text for one in track(hashed, _HASHING) for text in one.result()]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    if wrong:
        raise CheckpointError([_problem(text) for text in wrong])


def _unless(stop: threading.Event, name: str, file: _Opened, before: LockedFile) -> Any:
    def compared() -> list[str]:
        return list(_other_content(name, file, before, stop))

    return compared


def _other_content(
    name: str, file: _Opened, before: LockedFile, stop: threading.Event | None = None
) -> Iterator[str]:
    found = file.sha256(stop)
    if found != before.sha256:
        yield f"the file {name!r} has the SHA-256 {found}, locked is {before.sha256}"


def _problem(text: str) -> Problem:
    return Problem(where="lock", message=text, fix=_MAKE)


def _asked(prepared: Prepared) -> dict[str, Any]:
    data = read_spec(prepared.ctx.spec).data
    return {key: value for key, value in data.items() if key not in _PER_MACHINE}


def _revision(prepared: Prepared) -> str | None:
    """Return the commit of a snapshot of the hub's cache."""
    folder = Path(os.path.abspath(prepared.ctx.folder))
    parents = [folder, *folder.parents]
    return next((one.name for one in parents if one.parent.name == "snapshots"), None)


@dataclass(frozen=True)
class _Opened:
    """A file that a load opens."""

    path: Path
    """Links resolved."""
    of_checkpoint: CheckpointFile | None = None
    """It holds weights of the model."""

    @property
    def size(self) -> int:
        return self.of_checkpoint.size if self.of_checkpoint else self.path.stat().st_size

    @property
    def is_of_weights(self) -> bool:
        return self.of_checkpoint is not None or self.path.suffix in _SUFFIXES

    def sha256(self, stop: threading.Event | None = None) -> str:
        if self.of_checkpoint is not None:
            return of_weights(self.of_checkpoint, stop)
        return of_file(self.path, stop)


def _weights(prepared: Prepared, locked: Lock) -> Mapping[str, _Opened]:
    return {
        name: file
        for name, file in _opened(prepared).items()
        if name in locked.files and file.is_of_weights
    }


def _opened(prepared: Prepared) -> dict[str, _Opened]:
    """Return every file that a load opens by its name in the lock."""
    ctx = prepared.ctx
    files = () if ctx.checkpoint is None else ctx.checkpoint.files
    found = {file.name: _Opened(file.path, file) for file in files}
    patterns = _BESIDE_WEIGHTS + (_CODE if ctx.spec.trust_remote_code else ())
    for role, beside in (("", ctx.files), *ctx.files.others.items()):
        own = (*patterns, "*.safetensors") if role else patterns
        for path in _matching(beside, own):
            name = path.relative_to(beside.root).as_posix()
            found.setdefault(f"{role}/{name}" if role else name, _Opened(beside.path(name)))
    return dict(sorted(found.items()))


def _matching(files: UntrustedFolder, patterns: Iterable[str]) -> Iterator[Path]:
    for pattern in patterns:
        yield from (path for path in files.root.glob(pattern) if path.is_file())


def _text(value: Any) -> str:
    if value is None:
        return "absent"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}..."
