"""Files that are written: all of them or none, and a refusal where the disk has no place."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmload.checkpoint.filesystem import settle, sync
from llmload.errors import RequestError
from llmload.spec.wording import size_text


@contextmanager
def new_folder(folder: Path, *, room: int = 0) -> Iterator[None]:
    """Make a folder for what the block writes, and remove it again where the block fails.

    :param folder: is not there, or is empty.
    :param room: bytes that will be written, refused in advance where the disk has fewer.
    :raises RequestError: it cannot be made or written to, or its disk has no room.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with refused(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _hold_to(folder, room)
        yield
    except BaseException:
        for path in missing[-1:] or folder.glob("*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
        raise


def require_new(folder: Path, *, room: int = 0) -> None:
    """Refuse a folder that could not be made, or that has files.

    :param room: bytes that will be written.
    :raises RequestError: see above.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise RequestError(
            f"the folder {str(folder)!r} has files in it, and nothing is written over",
            fix="Name a new or an empty folder.",
        )
    with refused(folder):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        _hold_to(next(p for p in (folder, *folder.absolute().parents) if p.is_dir()), room)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give the block a folder to write to, which gets its name when all is written.

    Until then it lies beside it under a hidden name, on the same file system. It is removed where
    the block fails or is interrupted, together with the folders that were made for it.

    :raises RequestError: it cannot be made, or another process has put files there meanwhile.
    """
    folder = folder.absolute()
    made = [path for path in folder.parents if not path.exists()]
    building = folder.parent / f".{folder.name}.llmload-{os.getpid()}"
    try:
        with refused(folder):
            building.mkdir(parents=True)
        yield building
        with refused(folder):
            settle(building)
            building.replace(folder)  # of an empty folder too; one with files makes it fail
            sync(folder.parent)
    except BaseException:
        shutil.rmtree(made[-1] if made else building, ignore_errors=True)
        raise


def require_place(path: Path) -> None:
    """Refuse a file that could not be written, before what is to be in it has been made.

    :raises RequestError: see above.
    """
    with refused(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _hold_to(path.parent, 0)


def _hold_to(folder: Path, room: int) -> None:
    """Raise ``OSError`` where a folder cannot be written to, or its disk has less room."""
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {str(folder)!r}")
    probe = folder / f".llmload-{os.getpid()}"
    try:
        probe.write_bytes(b"1")  # asking for permissions tells nothing of a full disk
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    if shutil.disk_usage(folder).free < room:
        raise OSError(errno.ENOSPC, f"{size_text(room)} are needed")


@contextmanager
def refused(path: Path) -> Iterator[None]:
    """Make what the system says of the block's writing a refusal, with what room there is."""
    try:
        yield
    except Exception as error:
        full = os.strerror(errno.ENOSPC)
        if full in str(error):  # safetensors has an error of its own for it
            error = OSError(errno.ENOSPC, full)
        if not isinstance(error, OSError) or error.strerror is None:
            raise
        there = next(p for p in (path, *path.absolute().parents) if p.is_dir())
        room = f"; {size_text(shutil.disk_usage(there).free)} are free there"
        raise RequestError(
            f"it cannot be written: {error.strerror}"
            f"{room if error.errno in (errno.ENOSPC, errno.EDQUOT) else ''}",
            fix="Name a place that can be written to, with room.",
            where=str(path),
        ) from error
