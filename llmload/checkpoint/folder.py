"""Which files of a model folder hold its weights, and that none of them lies elsewhere."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

from llmload.checkpoint import mistaken, strict_json
from llmload.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
MAX_INDEX_BYTES = 25_000_000
_MAX_SHARDS = 10_000

_SHARD_OF = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<total>\d{5})(?P<suffix>\.[a-z]+)")
_FORBIDDEN = frozenset('\\:*?"<>|')


def refuse(where: Path, message: str, fix: str = "") -> CheckpointError:
    """The error for one file or folder, to be raised by the caller."""
    return CheckpointError(message, fix=fix, where=str(where))


def main_file(folder: Path, elsewhere: Collection[str] = ()) -> Path:
    """The file transformers would start from: single before index, safetensors before pickle.

    ``elsewhere`` has names of files that count as if they lay in the folder. Raises
    ``CheckpointError`` where the folder holds no weights by any of those names.
    """
    for name in (SINGLE, INDEX, PICKLE_SINGLE, PICKLE_INDEX):
        if name in elsewhere or os.path.lexists(folder / name):
            return folder / name
    found = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    listing = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "") if found else "nothing"
    raise refuse(
        folder,
        f"the folder holds neither {SINGLE} nor {INDEX}; found {listing}",
        mistaken.without_weights(folder),
    )


def member(root: Path, name: str, suffix: str) -> Path:
    """The real path of the shard an index calls ``name``, which must lie inside ``root``.

    ``name`` is read as a POSIX and as a Windows path, whatever this system is. A symbolic link may
    leave ``root`` only as the hub's cache lays it out: from ``snapshots/<commit>`` to ``blobs``.
    The file is not opened, and may be missing.

    :raises CheckpointError: it does not lie there.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if (
        not name.isascii()
        or not name.isprintable()
        or _FORBIDDEN.intersection(name)
        or windows.drive
        or windows.root
        or posix.is_absolute()
        or str(posix) != name
        or any(part == ".." or part.endswith((".", " ")) for part in posix.parts)
        or posix.suffix != suffix
    ):
        raise refuse(root, f"the index names the shard {name!r}, which is not a {suffix} file here")
    return inside(root, root / posix)


def inside(root: Path, path: Path) -> Path:
    """``path`` with links resolved, refused where that leaves ``root`` and the hub's blobs."""
    real_root, real = Path(os.path.realpath(root)), Path(os.path.realpath(path))
    snapshots = [parent for parent in real_root.parents if parent.name == "snapshots"]
    is_blob = bool(snapshots) and real.parent == snapshots[0].parent / "blobs"
    if not (is_blob or real.is_relative_to(real_root)):
        raise refuse(
            path,
            f"a link leads out of the model folder, to {real}",
            "Copy the file into the folder, or name the folder that holds it.",
        )
    return real


@contextmanager
def regular_file(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """``path`` open for reading, with its state, for a block; see :func:`open_regular`."""
    descriptor, state = open_regular(path)
    try:
        yield descriptor, state
    except OSError as error:  # of the disk or network, and of /proc/self/mem
        raise refuse(path, f"the file cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> tuple[int, os.stat_result]:
    """``path`` open for reading, with its state; refused unless it is a plain file.

    ``path`` has its links resolved already. Never blocks on a fifo and never follows a link put
    there since. The caller closes it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise refuse(path, "the file is missing", "Download or save the folder again.") from None
    except OSError as error:
        raise refuse(path, f"the file cannot be opened: {error.strerror}") from None
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode):
        os.close(descriptor)
        raise refuse(path, "this is not a plain file")
    return descriptor, state


def read_index(index: Path) -> dict[str, str]:
    """Tensor names and the shards that hold them, from an index file of the format's two keys."""
    with regular_file(index) as (descriptor, state):
        if state.st_size > MAX_INDEX_BYTES:
            raise refuse(
                index, f"the index has {state.st_size} bytes, more than {MAX_INDEX_BYTES} allowed"
            )
        data = os.pread(descriptor, state.st_size, 0)
    try:
        content = strict_json.loads(data)
    except ValueError as error:
        raise refuse(index, f"the index is unreadable: {error}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise refuse(index, "the index has no weight_map of tensor names to file names")
    shards = set(weight_map.values())
    if len(shards) > _MAX_SHARDS:
        raise refuse(index, f"the index names {len(shards):,} shards, of {_MAX_SHARDS:,} allowed")
    folded = {shard.casefold() for shard in shards}
    if len(folded) != len(shards):
        raise refuse(index, "the index names shards that differ in case only")
    return weight_map


def unlisted_shards(folder: Path, listed: set[str]) -> list[str]:
    """Files named as siblings of the ``listed`` shards ("-00002-of-00003") that are not listed.

    Shards of another total are left-overs of an older save, which the index rightly leaves out.
    """
    families = {_family(name) for name in listed} - {None}
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.name not in listed and _family(entry.name) in families
    )


def _family(name: str) -> tuple[str, ...] | None:
    match = _SHARD_OF.fullmatch(name)
    return match.group("stem", "total", "suffix") if match else None
